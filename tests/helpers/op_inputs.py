"""What the tests of ops draw: inputs, their strided twins, poisoned memory, an interaction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.exchanges.interaction import fold_interaction
from dualdiff_engine.exchanges.kind import Affine

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


def alignment(**others: Any) -> list[Any]:
    """Arguments of `align` in their order, all of them zero; some are replaced."""
    arguments = {
        "query": torch.zeros(2, 2, 3, 5, 8),
        "key": torch.zeros(4, 7, 8),
        "value": torch.zeros(4, 7, 8),
        "num_heads": 2,
        "mean_key": torch.zeros(4, 8),
        "tokens": torch.zeros(7),
        "scale": torch.zeros(1),
        "graphic": None,
    }
    return list((arguments | others).values())


def spoilt(op: str) -> dict[str, list[Any]]:
    """Right arguments, spoilt in one way each; by the words that the message must hold."""
    x, w, line = torch.zeros(2, 6, 8), torch.zeros(8, 8), torch.zeros(8)
    maps = torch.zeros(2, 8, 3, 3)
    cases: dict[str, dict[str, list[Any]]] = {
        "linear": {
            "weight [D, C]": [x, w[:, :5], None, None],
            "bias [D]": [x, w, line[:3], None],
            "residual [..., D]; got [2, 6, 8], [8, 8], None, [6, 8]": [x, w, None, x[0]],
            "of one dtype; got torch.float32, torch.float64": [x, w.double(), None, None],
        },
        "branch_linear": {
            "weight [F, D, C]": [x, w[None], None],
            "bias [D]": [x, w.expand(2, 8, 8), line[:3]],
            "with keep [1]": [x, w.expand(2, 8, 8), None, torch.zeros(2, 3, 4), None],
            "background_kv [R, S, E <= D]": [
                x,
                w.expand(2, 8, 8),
                None,
                torch.zeros(2, 3, 9),
                line[:1],
            ],
            "R·B·S rows": [x, w.expand(2, 8, 8), None, torch.zeros(2, 2, 4), line[:1]],
        },
        "attention": {
            "C of 3 heads; got [2, 6, 8]": [x, x, x, 3],
            "C of 0 heads": [x, x, x, 0],
            "keys and values [2, L, 8]; got [2, 6, 8], [2, 5, 8]": [x, x, x[:, :5], 2],
            "of 2 rows or the same divisor of them, keys": [x, *[torch.zeros(3, 6, 8)] * 2, 2],
            "divisor of them, keys and values [2, L, 8]; got [1, 6, 8]": [
                *(x, x, x, 2),
                *[x[:1]] * 2,
            ],
            "both more_key and more_value": [x, x, x, 2, x],
            "at least one key": [x, x[:, :0], x[:, :0], 2],
            "of one dtype": [x, x, x.half(), 2],
        },
        "exchange": {
            "input and residual [2, M, C]": [torch.zeros(3, 6, 8), w, line, w, line, x],
            "residual [2, 5, 8]": [x, w, line, w, line, x[:, :5]],
            "biases [C]": [x, w, line, w, line[:3], x],
            "of one dtype": [x, w, line.half(), w, line, x],
        },
        "merge": {
            "input and residual [2, M, C]": [torch.zeros(3, 6, 8), w.expand(2, 8, 8), x],
            "residual [2, 5, 8]": [x, w.expand(2, 8, 8), x[:, :5]],
            "weight [2, C, C]; got [2, 6, 8], [8, 8]": [x, w, x],
            "of one dtype": [x, w.expand(2, 8, 8), x.half()],
        },
        "align": {
            "C of 3 heads; got [2, 2, 3, 5, 8]": alignment(num_heads=3),
            "query [2, R, B, S, C]": alignment(query=x),
            "key and value [4, L, 8] of L > 0": alignment(key=x, value=x),
            "value [4, L, 8] of L > 0": alignment(
                key=torch.zeros(4, 0, 8), value=torch.zeros(4, 0, 8), tokens=line[:0]
            ),
            "mean_key [4, 8]": alignment(mean_key=torch.zeros(2, 8)),
            "tokens [L]": alignment(tokens=line[:6]),
            "scale [1]": alignment(scale=line[:2]),
            "graphic [5] or [3, 5]; got [6]": alignment(graphic=line[:6]),
            "of one dtype": alignment(scale=line[:1].half()),
        },
        "group_norm_silu": {
            "C in 3 groups": [maps, 3, line, line, 1e-5],
            "[N, C, h, w]": [maps[0], 2, line, line, 1e-5],
            "bias [C]; got [2, 8, 3, 3], [8], [7]": [maps, 2, line, line[:7], 1e-5],
        },
        "geglu": {
            "weight [2·I, C]": [x, w[:7], line[:7]],
            "bias [2·I]": [x, w, line[:6]],
        },
        "guided_step": {"noise [F, 2, ...]; got [2, 6, 8]": [x, 2.5]},
    }
    return cases[op]


def refuses(function: Callable[..., object], op: str) -> None:
    """Every spoilt argument raises ValueError in the words of the contract."""
    for message, arguments in spoilt(op).items():
        with pytest.raises(ValueError, match=f"^{op} takes") as raised:
            function(*arguments)
        assert message in str(raised.value)
