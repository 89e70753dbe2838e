"""The network: what is computed."""
