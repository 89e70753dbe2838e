"""A backend is used only after it computed the op right on this device."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.ops import (
    BACKENDS,
    NAMES,
    backend_module,
    bind,
    onednn,
    proof,
    reference,
    serves,
)

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
Op = Callable[..., Tensor]


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def raises(op: Op, *arguments: Any) -> Tensor:
    raise RuntimeError("could not create a primitive\nmore lines")


def not_a_number(op: Op, *arguments: Any) -> Tensor:
    out = op(*arguments)
    out.view(-1)[-1] = math.nan
    return out


def off_in_one_row(op: Op, *arguments: Any) -> Tensor:
    out = op(*arguments)
    rows = out.movedim(1, -1) if out.dim() == 4 else out
    rows[..., -1, :] *= 1.01
    return out


def off_at_one_shape(op: Op, *arguments: Any) -> Tensor:
    out = op(*arguments)
    return out * 1.01 if out.shape[-2] == 5 else out


def wide(op: Op, *arguments: Any) -> Tensor:
    return op(*arguments).double()


def hangs(op: Op, *arguments: Any) -> Tensor:
    time.sleep(1)
    return op(*arguments)


FAULTS: dict[Callable[..., Tensor], str] = {
    raises: r"fails: RuntimeError: could not create a primitive \(tried on 3x63x48",
    not_a_number: r"returns NaN or infinity \(tried on 3x63x48",
    off_in_one_row: r"is wrong by .*tried on",
    off_at_one_shape: r"is wrong by .*tried on 2x5x35",
    wide: r"returns torch\.float64 .* for torch\.(float32|bfloat16)",
    hangs: r"does not answer within 0\.2 s",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_faulty_backend_is_left_out(
    fault: Callable[..., Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what the reference needs is computed before the clock runs
    assert serves("reference", "geglu", CPU, dtype)[0]
    monkeypatch.setattr(onednn, "geglu", partial(fault, reference.geglu))
    if fault is hangs:
        monkeypatch.setitem(proof.LIMIT_S, "cpu", 0.2)
    row = next(row for row in bind("auto", dtype=dtype).table if row.op == "geglu")
    assert row.backend != "onednn"
    assert re.search(rf"not onednn: {FAULTS[fault]}", row.reason)
    with pytest.raises(BackendError, match=f"'geglu=onednn' cannot be used: .*{FAULTS[fault]}"):
        bind("geglu=onednn", dtype=dtype)


@pytest.mark.parametrize("op", [*NAMES, "convolution"])
def test_one_percent_in_one_row_shows(op: str, dtype: torch.dtype) -> None:
    right = getattr(reference, op)
    assert proof.prove(right, op, CPU, dtype).ok
    verdict = proof.prove(partial(off_in_one_row, right), op, CPU, dtype)
    assert not verdict.ok
    assert "is wrong by" in verdict.reason


@pytest.mark.parametrize("op", NAMES)
def test_what_claims_to_serve_does(op: str, dtype: torch.dtype) -> None:
    """Each backend that this machine offers is right, or is left out for what it raised."""
    for backend in BACKENDS:
        claimed, _ = backend_module(backend).supported(op, CPU, dtype)
        ok, reason = serves(backend, op, CPU, dtype)
        assert ok <= claimed
        assert ok or not claimed or reason.startswith("fails: "), reason


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(arguments)
        return reference.linear(*arguments)

    monkeypatch.setattr(onednn, "linear", counted)
    bind("auto")
    first = len(calls)
    assert first == len(proof.PROBLEMS["linear"])
    bind("auto")
    bind("linear=onednn")
    assert len(calls) == first


def test_inputs_of_a_failed_candidate_do_not_reach_the_next(dtype: torch.dtype) -> None:
    def spoils(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        input.fill_(math.nan)
        raise RuntimeError("too late")

    assert not proof.prove(spoils, "geglu", CPU, dtype).ok
    assert proof.prove(lambda *x: reference.geglu(*x), "geglu", CPU, dtype).ok


def test_a_pytorch_that_is_wrong_is_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    @wraps(reference.geglu)
    def loses(input: Tensor, *rest: Any) -> Tensor:
        return geglu(input.to(torch.bfloat16).to(input.dtype), *rest)

    geglu = reference.geglu
    monkeypatch.setattr(reference, "geglu", loses)
    monkeypatch.setattr(proof, "_exactly", lambda op, arguments: geglu(*arguments))
    proof._answer.cache_clear()
    try:
        with pytest.raises(BackendError, match=r"no backend runs geglu .*plain PyTorch is wrong"):
            bind("geglu=reference")
    finally:
        proof._answer.cache_clear()


def test_without_bf16_instructions_products_are_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    for op in onednn.OPS:
        monkeypatch.setattr(onednn, op, partial(raises, getattr(reference, op)))
    ops = bind("auto", dtype=torch.bfloat16)
    assert ops.widened
    assert ops.convolution is not bind("auto").convolution
    table = {row.op: row for row in ops.table}
    assert {table[op].backend for op in ("linear", "branch_linear", "geglu")} == {"widened"}
    assert "as slow as float32" in table["linear"].reason
    assert "not onednn: fails: RuntimeError: could not create" in table["linear"].reason
    with pytest.raises(BackendError, match=r"'onednn' cannot be used: .*could not create"):
        bind("onednn", dtype=torch.bfloat16)
