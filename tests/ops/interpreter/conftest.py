"""This folder runs in a process of its own: kernels are interpreted, on a CPU."""

import pytest
import torch

import dualdiff_engine.bench.gpu.interpreter  # noqa: F401
from op_inputs import poison


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
