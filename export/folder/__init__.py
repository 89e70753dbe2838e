"""What an export is on disk: artefacts, weights, adapters, bundles, and how they are verified."""
