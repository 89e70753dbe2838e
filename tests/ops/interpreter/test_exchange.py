"""exchange in the interpreter: the unfolded interaction in fp64 is the truth."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dualdiff_engine.exchanges.kind import Affine
from dualdiff_engine.ops.triton import composed_exchange
from dualdiff_engine.ops.triton.exchange import exchange as fused
from op_inputs import exchange_arguments, strided, unfolded_interaction
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")


Exchange = Callable[..., torch.Tensor]


@pytest.fixture(params=[fused, composed_exchange.exchange], ids=["fused", "composed"])
def exchange(request: pytest.FixtureRequest) -> Exchange:
    return request.param


@pytest.mark.parametrize(("rows", "channels"), [(63, 48), (1, 16), (70, 96)])
def test_exchange(exchange: Exchange, dtype: torch.dtype, rows: int, channels: int) -> None:
    given, parts = exchange_arguments(rows, channels, dtype)
    x, residual = given[0], given[-1]
    wide = {n: Affine(a.weight.double(), a.bias.double()) for n, a in parts.items()}
    exact = unfolded_interaction(x.double(), wide) + residual.double()
    eager = unfolded_interaction(x, parts) + residual
    before = x.clone()
    assert_within_budget("exchange", exchange(*given), eager, exact)
    given[0] = strided(x)
    assert_within_budget("strided", exchange(*given), eager, exact)
    assert torch.equal(x, before)


def test_wrong_shapes(exchange: Exchange) -> None:
    given, _ = exchange_arguments(3, 16, torch.float32)
    with pytest.raises(ValueError, match=r"exchange takes input and residual \[2, M, C\].*\[3, 3"):
        exchange(torch.zeros(3, 3, 16), *given[1:])
    with pytest.raises(ValueError, match=r"got .* and residual \[2, 4, 16\]"):
        exchange(*given[:-1], torch.zeros(2, 4, 16))


def test_registration(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given, _ = exchange_arguments(5, 16, torch.float32)
    torch.library.opcheck(exchange, tuple(given))
    compiled = torch.compile(lambda *a: exchange(*a) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), exchange(*given) * 2)
