"""This folder runs in a process of its own: kernels are interpreted, on a CPU."""

import dualdiff_engine.bench.interpreter  # noqa: F401
