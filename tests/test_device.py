"""Numerics of a run hold within it and nowhere else."""

from __future__ import annotations

import pytest
import torch

from dualdiff_engine.device import numerics, tf32_of
from dualdiff_engine.errors import SettingsError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def flags() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return cudnn.benchmark, cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("tf32", [False, True])
def test_numerics_of_a_gpu_are_restored(tf32: bool) -> None:
    before = flags()
    within = []

    def fails() -> None:
        with numerics(GPU, tf32):
            within.append(flags())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert within == [(True, tf32, tf32)]
    assert flags() == before
    with numerics(CPU, False):
        assert flags() == before


def test_tf32_is_of_float32_on_a_gpu() -> None:
    assert tf32_of(True, GPU, torch.float32)
    for device, dtype in ((CPU, torch.float32), (GPU, torch.bfloat16)):
        assert not tf32_of(False, device, dtype)
        with pytest.raises(SettingsError, match=f"is {dtype} on {device}: leave it out"):
            tf32_of(True, device, dtype)
