"""Every backend that reads memory by address refuses the same arguments in the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dualdiff_engine.ops import NAMES, backend_op, contracts, native, proof

CPU = torch.device("cpu")
OWN = [("native", op) for op in native.OPS] + [("onednn", "linear")]


def wrong(op: str) -> dict[str, list[Any]]:
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
            "share [R, S, E <= D]": [x, w.expand(2, 8, 8), None, torch.zeros(2, 3, 9), line[:1]],
            "R·B·S rows": [x, w.expand(2, 8, 8), None, torch.zeros(2, 2, 4), line[:1]],
        },
        "attention": {
            "C of 3 heads; got [2, 6, 8]": [x, x, x, 3],
            "C of 0 heads": [x, x, x, 0],
            "keys and values [2, L, 8]; got [2, 6, 8], [2, 5, 8]": [x, x, x[:, :5], 2],
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
    for message, arguments in wrong(op).items():
        with pytest.raises(ValueError, match=f"^{op} takes") as raised:
            function(*arguments)
        assert message in str(raised.value)


@pytest.mark.parametrize("op", NAMES)
def test_the_contract_of_an_op(op: str) -> None:
    """What a proof draws is accepted; everything spoilt is refused."""
    check: Callable[..., None] = getattr(contracts, op)
    scalars = {"exchange": 6, "group_norm_silu": 4, "guided_step": 1}
    for shapes in proof.PROBLEMS[op]:
        check(*proof.draw(op, shapes, CPU, torch.float32)[: scalars.get(op)])
    refuses(lambda *x: check(*x[: scalars.get(op)]), op)


@pytest.mark.parametrize(("backend", "op"), OWN)
def test_a_backend_keeps_to_the_contract(backend: str, op: str) -> None:
    run: Callable[..., Tensor] = backend_op(backend, op)
    refuses(run, op)
