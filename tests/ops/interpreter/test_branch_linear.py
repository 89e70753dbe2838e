"""linear and branch_linear in the interpreter against fp64."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops.triton.branch_linear import branch_linear, linear
from op_inputs import draw, spread, strided
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")

# the package has ops under the names of their modules
module = importlib.import_module("dualdiff_engine.ops.triton.branch_linear")

KEEP = 0.7


# odd sizes; one row; more than a tile of rows, columns and channels
@pytest.mark.parametrize(
    ("shape", "columns"), [((3, 63, 48), 40), ((1, 1, 16), 24), ((2, 70, 130), 72)]
)
@pytest.mark.parametrize("added", [True, False], ids=["bias+residual", "plain"])
def test_linear(dtype: torch.dtype, shape: tuple[int, ...], columns: int, added: bool) -> None:
    x = draw(*shape, dtype=dtype)
    w = draw(columns, shape[-1], dtype=dtype, seed=1)
    b = draw(columns, dtype=dtype, seed=2) if added else None
    r = draw(*shape[:-1], columns, dtype=dtype, seed=3) if added else None
    exact = x.double() @ w.double().T
    eager = F.linear(x, w, b)
    if b is not None and r is not None:
        exact, eager = exact + b.double() + r.double(), eager + r
    actual = linear(x, w, b, r)
    assert actual.is_contiguous()
    assert_within_budget("linear", actual, eager, exact)
    for layout in (strided, spread):
        moved = linear(layout(x), w, b, None if r is None else layout(r))
        assert torch.equal(moved, actual)


@pytest.mark.parametrize("branches", [1, 2])
def test_branch_linear(dtype: torch.dtype, branches: int) -> None:
    x = draw(branches, 63, 48, dtype=dtype)
    w = draw(branches, 40, 48, dtype=dtype, seed=1)
    b = draw(40, dtype=dtype, seed=2)
    exact = torch.einsum("fmc,fdc->fmd", x.double(), w.double()) + b.double()
    eager = torch.stack([F.linear(x[f], w[f], b) for f in range(branches)])
    actual = branch_linear(x, w, b)
    assert_within_budget("branch_linear", actual, eager, exact)
    for layout in (strided, spread):
        assert torch.equal(branch_linear(layout(x), w, b), actual)
    # rows may have any number of dimensions, as those of text have
    assert torch.equal(branch_linear(x.view(branches, 3, 21, 48), w, b).flatten(1, 2), actual)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_background_joins_the_first_branch(dtype: torch.dtype, pairs: int, bias: bool) -> None:
    groups, positions, channels = 2, 21, 24
    x = draw(2, groups * pairs * positions, channels, dtype=dtype)
    w = draw(2, 3 * channels, channels, dtype=dtype, seed=1)
    b = draw(3 * channels, dtype=dtype, seed=2) if bias else None
    background_kv = draw(groups, positions, 2 * channels, dtype=dtype, seed=3)
    keep = torch.full((1,), KEEP, dtype=dtype)

    def plain(
        x: Tensor, w: Tensor, b: Tensor | None, background_kv: Tensor, keep: Tensor
    ) -> Tensor:
        out = torch.stack([F.linear(x[f], w[f], b) for f in range(2)])
        own = out[0].view(groups, pairs, positions, 3 * channels)[..., channels:]
        own.copy_(keep * own + background_kv[:, None])
        return out

    wide = [None if t is None else t.double() for t in (x, w, b, background_kv, keep)]
    exact, eager = plain(*wide), plain(x, w, b, background_kv, keep)
    assert_within_budget("background_kv", branch_linear(x, w, b, background_kv, keep), eager, exact)


def test_every_tile_of_every_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # small tiles: a full group of rows and part of another, some columns, part of the last channels
    tiles = module.product_config(16, 16, 16, num_warps=4, num_stages=1)
    monkeypatch.setattr(module, "default_config", lambda *_: tiles)
    x, w = draw(2, 170, 40, dtype=torch.float32), draw(2, 40, 40, dtype=torch.float32, seed=1)
    exact = torch.einsum("fmc,fdc->fmd", x.double(), w.double())
    assert_within_budget("tiles", branch_linear(x, w), torch.einsum("fmc,fdc->fmd", x, w), exact)


def test_wrong_shapes() -> None:
    x, w = torch.zeros(2, 6, 8), torch.zeros(2, 4, 8)
    background_kv, keep = torch.zeros(2, 2, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"weight \[D, C\].*got \[2, 6, 8\], \[4, 9\], None"):
        linear(x, torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"residual \[..., D\]; got .*\[6, 4\]"):
        linear(x, w[0], None, torch.zeros(6, 4))
    with pytest.raises(ValueError, match="contiguous weight"):
        linear(x, torch.zeros(8, 4).T)
    with pytest.raises(ValueError, match=r"weight \[F, D, C\].*got \[2, 6, 8\], \[1, 4, 8\]"):
        branch_linear(x, w[:1])
    with pytest.raises(ValueError, match=r"bias \[D\].*\[3\]"):
        branch_linear(x, w, torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"background_kv \[R, S, E <= D\] with keep \[1\]; got .*None$"
    ):
        branch_linear(x, w, None, background_kv)
    with pytest.raises(ValueError, match=r"\[2, 2, 4\], \[1\]"):
        branch_linear(x, w, None, background_kv, keep)


def arguments() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    x, w, b = torch.randn(2, 6, 8), torch.randn(2, 4, 8), torch.randn(4)
    background_kv, keep = torch.randn(3, 2, 2), torch.randn(1)
    return (x, w[0], b, torch.randn(2, 6, 4)), (x, w, b, background_kv, keep)


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for op, given in zip((linear, branch_linear), arguments(), strict=True):
        torch.library.opcheck(op, given)
        torch.library.opcheck(op, given[:2])


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    first, second = arguments()

    def both() -> Tensor:
        return linear(*first) + branch_linear(*second)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), both())


def test_products_are_counted() -> None:
    first, second = arguments()
    with FlopCounterMode(display=False) as counter:
        linear(*first)
        branch_linear(*second)
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 8 * 4)
