"""geglu in the interpreter against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops.triton.geglu import geglu
from op_inputs import draw, spread, strided
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")


# odd sizes; one row; more than a tile of rows, columns and channels
@pytest.mark.parametrize(
    ("shape", "columns"), [((3, 63, 48), 40), ((1, 1, 16), 23), ((2, 70, 130), 72)]
)
def test_geglu(dtype: torch.dtype, shape: tuple[int, ...], columns: int) -> None:
    x = draw(*shape, dtype=dtype)
    w = draw(2 * columns, shape[-1], dtype=dtype, seed=1)
    b = draw(2 * columns, dtype=dtype, seed=2)

    def plain(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value, gate = F.linear(x, w, b).chunk(2, dim=-1)
        return value * F.gelu(gate)

    exact = plain(x.double(), w.double(), b.double())
    actual = geglu(x, w, b)
    assert actual.is_contiguous()
    assert_within_budget("geglu", actual, plain(x, w, b), exact)
    for layout in (strided, spread):
        assert torch.equal(geglu(layout(x), w, b), actual)


def test_wrong_shapes() -> None:
    x, w, b = torch.zeros(2, 6, 8), torch.zeros(10, 8), torch.zeros(10)
    with pytest.raises(ValueError, match=r"weight \[2·I, C\].*got \[2, 6, 8\], \[9, 8\], \[9\]"):
        geglu(x, w[:9], b[:9])
    with pytest.raises(ValueError, match=r"got \[2, 6, 7\], \[10, 8\]"):
        geglu(x[..., :7], w, b)
    with pytest.raises(ValueError, match=r"bias \[2·I\]; got .*\[5\]"):
        geglu(x, w, b[:5])
    with pytest.raises(ValueError, match="contiguous weight"):
        geglu(x, torch.zeros(8, 10).T, b)


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 6, 8), torch.randn(10, 8), torch.randn(10)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.library.opcheck(geglu, arguments())


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = arguments()
    compiled = torch.compile(lambda: geglu(*given) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), geglu(*given) + 1)


def test_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        geglu(*arguments())
    assert counter.get_total_flops() == 4 * (2 * 6) * 8 * 5
