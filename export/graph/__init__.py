"""Traced networks: what is exported, written, and validated against the engine."""
