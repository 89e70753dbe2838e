"""Benchmarks; installed as `dualdiff_engine.bench`."""
