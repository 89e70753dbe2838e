"""Shared fixtures: the golden cases, and engines built from them once per session."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# what was measured on this machine does not reach the tests
os.environ["DUALDIFF_CACHE"] = tempfile.mkdtemp(prefix="dualdiff-tests-")

import pytest
import torch

from dualdiff_engine import Engine
from support import CASES, Golden, golden_engine, load_golden

# on tiny networks a second thread costs more than it brings, and a busy machine makes it wait
torch.set_num_threads(1)


@pytest.fixture(scope="session", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def engines() -> dict[tuple[str, str], Engine]:
    return {}


@pytest.fixture(scope="session")
def engine_of(engines: dict[tuple[str, str], Engine]) -> Any:
    """engine_of(case, dtype): a golden engine, built once. Tests leave it as they found it."""

    def get(name: str, dtype: str = "float32") -> Engine:
        key = (name, dtype)
        if key not in engines:
            engines[key] = golden_engine(name, dtype=dtype)
        return engines[key]

    return get


@pytest.fixture
def dual(engine_of: Any) -> Engine:
    return engine_of("dual")


@pytest.fixture
def bcm(engine_of: Any) -> Engine:
    return engine_of("bcm")


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.inference_mode():
        yield
