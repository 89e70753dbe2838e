"""group_norm_silu in the interpreter against fp64."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops.triton.group_norm_silu import group_norm_silu
from op_inputs import draw
from tolerance import assert_within_budget, relative

pytestmark = pytest.mark.usefixtures("poisoned")

# the package has ops under the names of their modules
module = importlib.import_module("dualdiff_engine.ops.triton.group_norm_silu")

EPS = 1e-5


def maps(*shape: int, dtype: torch.dtype) -> Tensor:
    return draw(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def plain(x: Tensor, groups: int, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, groups, w, b, EPS))


def check(x: Tensor, groups: int) -> None:
    channels = x.shape[1]
    w, b = (draw(channels, dtype=x.dtype, seed=seed) for seed in (1, 2))
    before = x.clone()
    actual = group_norm_silu(x, groups, w, b, EPS)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    exact = plain(x.double(), groups, w.double(), b.double())
    assert_within_budget("group_norm_silu", actual, plain(x, groups, w, b), exact)
    assert torch.equal(x, before)


# a position; one part; parts of which the last is short; groups in blocks, the last part empty; a
# group wider than a block
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((3, 48, 1, 1), 8),
        ((3, 48, 3, 5), 8),
        ((1, 48, 7, 9), 8),
        ((2, 320, 5, 7), 32),
        ((1, 690, 3, 6), 23),
        ((1, 600, 4, 5), 2),
    ],
)
def test_group_norm_silu(dtype: torch.dtype, shape: tuple[int, ...], groups: int) -> None:
    check(maps(*shape, dtype=dtype), groups)


# lanes outside a map hold zeros, 3000 deviations below the mean
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_mean_far_from_zero() -> None:
    mean, one = 3000.0, torch.ones(48)
    x = maps(2, 48, 7, 9, dtype=torch.float32) + mean
    exact = plain(x.double(), 8, one.double(), one.double())
    # deviations are 1: what rounding the mean alone loses; squaring first loses everything
    budget = mean * torch.finfo(torch.float32).eps
    assert relative(group_norm_silu(x, 8, one, one, EPS), exact) <= budget


def test_other_layouts_are_copied(dtype: torch.dtype) -> None:
    check(draw(2, 48, 5, 7, dtype=dtype), 8)
    check(maps(2, 96, 5, 7, dtype=dtype)[:, ::2], 8)


def test_every_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(2, 80, 6, 11, dtype=torch.float32)
    for config in module.candidates(66, 80, 8)[::2]:
        monkeypatch.setattr(module, "default_config", lambda *_, config=config: config)
        check(x, 8)


def test_wrong_shapes() -> None:
    x, w = torch.zeros(2, 48, 3, 3), torch.zeros(48)
    with pytest.raises(ValueError, match=r"C in 7 groups.*got \[2, 48, 3, 3\], \[48\], \[48\]"):
        group_norm_silu(x, 7, w, w, EPS)
    with pytest.raises(ValueError, match=r"input \[N, C, h, w\].*got \[2, 48, 3\]"):
        group_norm_silu(x[..., 0], 8, w, w, EPS)
    with pytest.raises(ValueError, match=r"bias \[C\]; got .*\[47\]"):
        group_norm_silu(x, 8, w, w[:47], EPS)


def arguments() -> tuple[Tensor, int, Tensor, Tensor, float]:
    return maps(2, 24, 3, 5, dtype=torch.float32), 4, torch.randn(24), torch.randn(24), EPS


def test_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.library.opcheck(group_norm_silu, arguments())


def test_compiles_into_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    given = arguments()
    compiled = torch.compile(lambda: group_norm_silu(*given) + 1, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), group_norm_silu(*given) + 1)


def test_no_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        group_norm_silu(*arguments())
    assert counter.get_total_flops() == 0
