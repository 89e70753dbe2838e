"""An export on disk: artefacts, weights, adapters, bundles, and their verification."""
