"""A launch binds its arguments and compiles once for all sizes; no GPU, so it stops before running.

Triton asks a driver which GPU there is. A stand-in answers: an H100.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

HALF = MockTensor(torch.float16)
SINGLE = MockTensor(torch.float32)


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


def attention(dim: int, positions: int, length: int, stride: int, rows: int = 4) -> Any:
    op = module("attention")
    config = op.default_config(dim, torch.float16, length)
    constants = op._constants(dim, config, [length], aligned=True, shared=False)
    return op._attention_kernel.warmup(
        *[HALF] * 5, None, None, HALF, *[stride] * 10, 8, positions, length, length, rows, 0.1,
        grid=(1,), **constants, **config.arguments,
    )  # fmt: skip


def test_attention_compiles_once_for_all_sizes() -> None:
    one = attention(40, 4096, 4096, 320)
    # sizes and strides of 1 and 0, and those that are no multiple of 16, are often special
    assert attention(40, 1, 1024, 0) is one
    assert attention(40, 4097, 1024, 963, 1) is one
    # a width that is not cut in two parts is another kernel
    assert attention(64, 4096, 4096, 320) is not one


def branch_linear(rows: int) -> Any:
    op = module("branch_linear")
    config = op.default_config(524288, 960, torch.float16)
    return op._branch_linear_kernel.warmup(
        HALF, HALF, None, None, HALF, HALF, HALF, rows, rows, rows,
        grid=(1,), **op._constants(960, 320, 320, 640), **config.arguments,
    )  # fmt: skip


def exchange(positions: int) -> Any:
    op = module("exchange")
    config = op.default_config(torch.float16)
    return op._exchange_kernel.warmup(
        *[HALF] * 6, positions, HALF, 1e-6, grid=(1,), CHANNELS=320, **config.arguments
    )


def merge(positions: int) -> Any:
    op = module("merge")
    config = op.default_config(torch.float16)
    return op._merge_kernel.warmup(
        *[HALF] * 3, positions, HALF, 1e-6, grid=(1,), CHANNELS=320, **config.arguments
    )


def scores(positions: int) -> Any:
    op = module("align")
    return op._scores_kernel.warmup(
        HALF, HALF, SINGLE, positions, 0.1, grid=(1,), CHANNELS=320, **op.SCORES.arguments
    )


def bias(positions: int) -> Any:
    op = module("align")
    return op._bias_kernel.warmup(
        SINGLE, HALF, HALF, SINGLE, *[positions] * 4, 2.5, 6.3, 1e-6,
        grid=(1,), **op.BIAS.arguments,
    )  # fmt: skip


def geglu(rows: int) -> Any:
    op = module("geglu")
    config = op.default_config(524288, 1280, torch.float16)
    return op._geglu_kernel.warmup(*[HALF] * 4, rows, 320, 1280, 320, grid=(1,), **config.arguments)


def group_norm_statistics(positions: int) -> Any:
    op = module("group_norm_silu")
    config = op.default_config(4096, 320, 32)
    constants, _ = op._constants(4096, 320, 32, config)
    return op._group_norm_statistics_kernel.warmup(
        HALF, SINGLE, positions, grid=(1,), **constants, **config.arguments
    )


def group_norm_silu(positions: int) -> Any:
    op = module("group_norm_silu")
    config = op.default_config(4096, 320, 32)
    _, constants = op._constants(4096, 320, 32, config)
    return op._group_norm_silu_kernel.warmup(
        HALF, SINGLE, HALF, HALF, HALF, positions, 1e-5,
        grid=(1,), **constants, **config.arguments,
    )  # fmt: skip


@pytest.mark.parametrize(
    "launch",
    [branch_linear, exchange, merge, scores, bias, geglu, group_norm_statistics, group_norm_silu],
)
def test_compiles_once_for_all_sizes(launch: Callable[[int], Any]) -> None:
    one = launch(4096)
    assert launch(1) is one
    assert launch(63) is one


@pytest.mark.parametrize("size", [1, 63, 4096])
def test_guided_step_compiles_for_every_size(size: int) -> None:
    """Once per kind of size: of multiples of 16 it reads whole vectors."""
    op = module("guided_step")
    kernel = op._guided_step_kernel
    built = kernel.warmup(HALF, SINGLE, size, 2.5, grid=(1,), **op.CONFIG.arguments)
    assert ("ld.global.v" in built.asm["ptx"]) == (size % 16 == 0)
