"""The demo: a factory of synthetic parts, and a small model of them that ships with the package."""
