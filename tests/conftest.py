"""Shared fixtures: the golden cases, and engines built from them once per session."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dualdiff_engine import Engine

# on tiny networks a second thread costs more than it brings, and a busy machine makes it wait
torch.set_num_threads(1)

DATA = Path(__file__).parent / "data"
CASES = ("dual", "bcm")


@dataclass(frozen=True)
class Golden:
    """Outputs of the released program; see tests/data/README.md."""

    name: str
    settings: dict[str, Any]
    denoiser: dict[str, Tensor]
    pipeline: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return DATA / self.name

    @property
    def background(self) -> bool:
        return self.name == "bcm"


def load_golden(name: str) -> Golden:
    folder = DATA / name
    return Golden(
        name,
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "denoiser.safetensors"),
        load_file(folder / "pipeline.safetensors"),
    )


def golden_engine(name: str, **options: Any) -> Engine:
    folder = DATA / name
    return Engine.from_pretrained(
        folder / "model", adapter=folder / "adapter", allow_pickle=True, **options
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, computed in fp64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def by_branch(rows: Tensor) -> Tensor:
    """Released row order [P·2, ...], branch fastest, -> [2, P, ...]."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).contiguous()


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
