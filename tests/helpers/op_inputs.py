"""What the tests of ops draw: inputs, their strided twins, poisoned memory, an interaction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.adapters.fold import fold_interaction
from dualdiff_engine.adapters.format import Affine

_new_empty = Tensor.new_empty


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op takes and does not write shows as NaN."""

    def poisoned(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        return _new_empty(self, *shape, **options).fill_(math.nan)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same values, every row in one twice as long."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def spread(x: Tensor) -> Tensor:
    """The same values [N, M, C], no single stride between rows."""
    wide = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2]), math.nan, dtype=x.dtype)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def interaction(channels: int, dtype: torch.dtype) -> dict[str, Affine]:
    parts = {}
    for number, name in enumerate(("norm", "input", "query", "key", "value", "output")):
        shape = (channels,) if name == "norm" else (channels, channels)
        weight = draw(*shape, dtype=dtype, seed=number) / (1 if name == "norm" else channels**0.5)
        parts[name] = Affine(weight, 0.3 * draw(channels, dtype=dtype, seed=number + 10))
    return parts


def unfolded_interaction(x: Tensor, parts: dict[str, Affine]) -> Tensor:
    """The ten products, as printed in the paper's formulas. x [2, M, C]."""
    channels = x.shape[-1]
    norm = parts["norm"]
    z = F.layer_norm(x, (channels,), norm.weight, norm.bias, 1e-6)
    z = F.linear(z, parts["input"].weight, parts["input"].bias)
    q, k, v = (F.linear(z, parts[n].weight, parts[n].bias) for n in ("query", "key", "value"))
    scores = torch.einsum("fmc,gmc->mfg", q, k) / math.sqrt(channels)
    mixed = torch.einsum("mfg,gmc->fmc", torch.softmax(scores, dim=-1), v)
    return x + F.linear(mixed, parts["output"].weight, parts["output"].bias)


def exchange_arguments(
    rows: int, channels: int, dtype: torch.dtype
) -> tuple[list[Tensor], dict[str, Affine]]:
    """(arguments of the exchange op, parts of the interaction they were folded from)."""
    parts = interaction(channels, dtype)
    folded = fold_interaction(parts, torch.empty(0, dtype=torch.float64))
    names = ("gate_weight", "gate_bias", "value_weight", "value_bias")
    x = draw(2, rows, channels, dtype=dtype)
    residual = draw(2, rows, channels, dtype=dtype, seed=7)
    return [x, *(folded[name].to(dtype) for name in names), residual], parts
