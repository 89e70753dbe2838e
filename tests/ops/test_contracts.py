"""Every backend that reads memory by address refuses the same arguments in the same words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dualdiff_engine.ops import NAMES, backend_op, contracts, native, proof
from op_inputs import refuses

CPU = torch.device("cpu")
OWN = [("native", op) for op in native.OPS] + [("onednn", "linear")]


@pytest.mark.parametrize("op", NAMES)
def test_the_contract_of_an_op(op: str) -> None:
    """What a proof draws is accepted; everything spoilt is refused."""
    check: Callable[..., None] = getattr(contracts, op)
    scalars = {"exchange": 6, "merge": 3, "align": 8, "group_norm_silu": 4, "guided_step": 1}
    for shapes in proof.PROBLEMS[op]:
        check(*proof.draw(op, shapes, CPU, torch.float32)[: scalars.get(op)])
    refuses(lambda *x: check(*x[: scalars.get(op)]), op)


def test_a_kernel_may_ask_for_contiguous_memory() -> None:
    x = torch.zeros(4, 6)
    contracts.contiguous("geglu", "weight", x)
    with pytest.raises(ValueError, match=r"geglu takes a contiguous weight; got strides \[1, 6\]"):
        contracts.contiguous("geglu", "weight", x.mT)


@pytest.mark.parametrize(("backend", "op"), OWN)
def test_a_backend_keeps_to_the_contract(backend: str, op: str) -> None:
    run: Callable[..., Tensor] = backend_op(backend, op)
    refuses(run, op)
