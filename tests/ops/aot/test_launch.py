"""A launch binds its arguments and compiles once for all sizes; no GPU, so it stops before running.

Triton asks a driver which GPU there is. A stand-in answers: an H100.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

HALF = MockTensor(torch.float16)


class H100:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture(autouse=True)
def _an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", H100())


def module(op: str) -> Any:
    # the package has ops under the names of their modules
    return importlib.import_module(f"dualdiff_engine.ops.triton.{op}")


def attention(dim: int, positions: int, length: int, stride: int) -> Any:
    op = module("attention")
    config = op.default_config(dim, torch.float16, length)
    return op._attention_kernel.warmup(
        *[HALF] * 6, *[stride] * 10, 8, positions, length, length, 0.1,
        grid=(1,), **op._constants(dim, config, [length], True), **config.arguments,
    )  # fmt: skip


def test_attention_compiles_once_for_all_sizes() -> None:
    one = attention(40, 4096, 4096, 320)
    # sizes and strides of 1 and 0, and those that are no multiple of 16, are often special
    assert attention(40, 1, 1024, 0) is one
    assert attention(40, 4097, 1024, 963) is one
    # a width that is not cut in two parts is another kernel
    assert attention(64, 4096, 4096, 320) is not one


def branch_linear(rows: int, positions: int) -> Any:
    op = module("branch_linear")
    config = op.default_config(524288, 960, torch.float16)
    return op._branch_linear_kernel.warmup(
        HALF, HALF, None, None, HALF, HALF, HALF, rows, positions, positions,
        grid=(1,), **op._constants(960, 320, 320, 640), **config.arguments,
    )  # fmt: skip


def test_branch_linear_compiles_once_for_all_sizes() -> None:
    one = branch_linear(4096, 1024)
    assert branch_linear(1, 1) is one
    assert branch_linear(4097, 63) is one
