"""How the shipped base and adapters are trained."""
