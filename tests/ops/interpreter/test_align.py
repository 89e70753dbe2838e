"""align in the interpreter: maps of several blocks, graphics of all pairs or of each, strides."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops import reference
from dualdiff_engine.ops.triton.align import align
from dualdiff_engine.ops.triton.tuning import Config
from op_inputs import draw
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(
    shape: tuple[int, ...], length: int, heads: int, dtype: torch.dtype, graphic: str = ""
) -> list[Any]:
    """Two tokens have a bias; keys and values are views into one projection."""
    _, rows, pairs, positions, channels = shape
    query = draw(*shape, dtype=dtype)
    key, value = draw(2 * rows, length, 2 * channels, dtype=dtype, seed=1).chunk(2, dim=-1)
    tokens = torch.zeros(length, dtype=dtype)
    tokens[length // 2 :][:2] = 1
    mean_key = key[:, length // 2 :][:, :2].mean(1)
    scale = torch.tensor([0.7]).to(dtype)
    given = [query, key, value, heads, mean_key, tokens, scale]
    if graphic:
        where = (positions,) if graphic == "shared" else (pairs, positions)
        given += [draw(*where, dtype=dtype, seed=3).sigmoid(), 2.5]
    return given


def wide(given: list[Any]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) else x for x in given]


@pytest.mark.parametrize(
    ("shape", "length", "heads", "graphic"),
    [
        ((2, 2, 3, 13, 40), 77, 1, "own"),
        ((2, 2, 3, 13, 40), 77, 1, ""),
        ((2, 1, 1, 1, 16), 1, 1, "shared"),
        ((2, 1, 2, 35, 96), 9, 2, "shared"),
    ],
)
def test_align(
    dtype: torch.dtype, shape: tuple[int, ...], length: int, heads: int, graphic: str
) -> None:
    given = arguments(shape, length, heads, dtype, graphic)
    actual = align(*given)
    assert actual.is_contiguous()
    exact = reference.align(*wide(given))
    assert_within_budget("align", actual, reference.align(*given), exact)


def test_a_map_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    # the name in the package is the op's module
    module = importlib.import_module("dualdiff_engine.ops.triton.align")
    monkeypatch.setattr(module, "BIAS", Config({"BLOCK": 16}))
    given = arguments((2, 1, 2, 64, 16), 9, 1, torch.float32, "own")
    exact = reference.align(*wide(given))
    assert_within_budget("several blocks", align(*given), reference.align(*given), exact)
    # a pair does not depend on its batch, here one of whole tiles
    query, *rest, graphic, strength = given
    alone = align(query[:, :, 1:], *rest, graphic[1:], strength)
    assert torch.equal(alone, align(*given)[:, :, 1:])


def test_a_flat_map_draws_nothing(dtype: torch.dtype) -> None:
    query, *rest = arguments((2, 1, 1, 1, 80), 7, 2, dtype)
    query = 30 * query.expand(2, 1, 1, 63, 80).contiguous()
    drawn = align(query, *rest[:-1], torch.full((1,), 100.0, dtype=dtype))
    assert torch.equal(drawn, align(query, *rest[:-1], torch.zeros(1, dtype=dtype)))


def test_wrong_shapes() -> None:
    given = arguments((2, 1, 1, 5, 80), 7, 2, torch.float32)
    with pytest.raises(ValueError, match=r"heads of at most 256 columns; got 257"):
        align(*arguments((2, 1, 1, 5, 257), 7, 1, torch.float32))
    with pytest.raises(ValueError, match=r"graphic \[5\] or \[1, 5\]; got \[6\]"):
        align(*given, torch.zeros(6), 1.0)


@pytest.mark.parametrize("graphic", ["", "own"])
def test_registration(monkeypatch: pytest.MonkeyPatch, graphic: str) -> None:
    monkeypatch.undo()
    given = tuple(arguments((2, 1, 2, 5, 32), 7, 2, torch.float32, graphic))
    torch.library.opcheck(align, given)
    compiled = torch.compile(lambda *a: align(*a) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*given), align(*given) * 2)
    with FlopCounterMode(display=False) as counter:
        align(*given)
    assert counter.get_total_flops() == 2 * 1 * 2 * 5 * 32 * (4 * 7 + 2)
