"""merge in the interpreter: the formula in fp64 is the truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton.merge import candidates, merge
from op_inputs import draw, strided
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")


def plain(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:], eps=INTERACTION_EPS)
    moved = [(normed[1 - f] - normed[f]) @ weight[f].mT for f in range(2)]
    return residual + x + torch.stack(moved)


def arguments(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, residual = (draw(2, rows, channels, dtype=dtype, seed=s) for s in (0, 7))
    weight = draw(2, channels, channels, dtype=dtype, seed=1) / channels**0.5
    return x, weight, residual


@pytest.mark.parametrize(("rows", "channels"), [(33, 48), (1, 16)])
def test_merge(dtype: torch.dtype, rows: int, channels: int) -> None:
    x, weight, residual = arguments(rows, channels, dtype)
    exact = plain(x.double(), weight.double(), residual.double())
    eager = plain(x, weight, residual)
    before = x.clone()
    assert_within_budget("merge", merge(x, weight, residual), eager, exact, terms=channels)
    actual = merge(strided(x), weight, residual)
    assert_within_budget("strided", actual, eager, exact, terms=channels)
    assert torch.equal(x, before)


def test_wrong_shapes() -> None:
    x, weight, residual = arguments(3, 16, torch.float32)
    with pytest.raises(ValueError, match=r"weight \[2, C, C\]; got \[2, 3, 16\], \[16, 16\]"):
        merge(x, weight[0], residual)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = arguments(5, 16, torch.float32)
    torch.library.opcheck(merge, given)
    compiled = torch.compile(lambda *a: merge(*a) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), merge(*given) * 2)
    with FlopCounterMode(display=False) as counter:
        merge(*given)
    assert counter.get_total_flops() == 2 * 2 * 5 * 16 * 16
    assert len(candidates(torch.bfloat16)) > 3
