"""Metadata is in pyproject.toml; the native extension is compiled only when it is asked for.

    DUALDIFF_BUILD_NATIVE=cpu pip install --no-build-isolation .

It needs GCC with OpenMP, and pybind11. Without the variable no compiler is looked for.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup

# no -march: every level of instructions is compiled and one is chosen at run time. GCC's own
# AVX-512 headers set off its warning about uninitialised variables.
COMPILE = [
    "-O3", "-g0", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-fvisibility=hidden",
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip


def native_extensions() -> list[Extension]:
    """What DUALDIFF_BUILD_NATIVE, a comma-separated list, asks for."""
    asked = {part.strip() for part in os.environ.get("DUALDIFF_BUILD_NATIVE", "").split(",")}
    asked.discard("")
    if "cuda" in asked:
        raise SystemExit(
            "DUALDIFF_BUILD_NATIVE=cuda: this version has no CUDA sources; its GPU kernels are in "
            "Triton and need no build (pip install dualdiff-engine[triton])"
        )
    if unknown := asked - {"cpu"}:
        raise SystemExit(f"DUALDIFF_BUILD_NATIVE takes cpu, got {', '.join(sorted(unknown))}")
    if not asked:
        return []
    try:
        import pybind11
    except ImportError:
        raise SystemExit(
            "DUALDIFF_BUILD_NATIVE=cpu needs pybind11: pip install pybind11, then build with "
            "pip install --no-build-isolation ."
        ) from None
    csrc = Path("csrc")
    return [
        Extension(
            "dualdiff_engine._native",
            sources=sorted(str(path) for path in csrc.glob("*.cpp")),
            depends=sorted(str(path) for path in csrc.glob("*.h")),
            include_dirs=[pybind11.get_include()],
            extra_compile_args=COMPILE,
            extra_link_args=["-fopenmp"],
            language="c++",
        )
    ]


setup(ext_modules=native_extensions())
