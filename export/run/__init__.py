"""Exported networks as an engine runs them."""
