"""attention in the interpreter: head dimensions of SD-1.5 and odd ones, views, two sources."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.ops.triton.attention import attention, candidates, default_config, split
from op_inputs import draw, strided
from tolerance import assert_within_budget

pytestmark = pytest.mark.usefixtures("poisoned")


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def check(name: str, heads: int, q: Tensor, *sources: tuple[Tensor, Tensor]) -> Tensor:
    keys, values = (torch.cat(parts, 1) for parts in zip(*sources, strict=True))
    exact = plain(q.double(), keys.double(), values.double(), heads)
    more = sources[1] if len(sources) == 2 else ()
    actual = attention(q, *sources[0], heads, *more)
    assert actual.is_contiguous()
    assert_within_budget(name, actual, plain(q, keys, values, heads), exact)
    return actual


def pair(*shape: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Key and value [N, L, C], views into a packed projection."""
    key, value = draw(*shape[:-1], 2 * shape[-1], dtype=dtype, seed=seed).chunk(2, dim=-1)
    return key, value


@pytest.mark.parametrize(
    ("dim", "parts"),
    [
        (40, (32, 16)),
        (80, (64, 16)),
        (160, (128, 32)),
        (48, (32, 16)),
        (96, (64, 32)),
        (8, (16, 0)),
        (20, (32, 0)),
        (64, (64, 0)),
        (127, (128, 0)),
    ],
)
def test_split(dim: int, parts: tuple[int, int]) -> None:
    assert split(dim) == parts


@pytest.mark.parametrize("dim", [40, 80, 160, 1, 8, 10, 12, 16, 20, 24, 64])
def test_head_dimensions(dtype: torch.dtype, dim: int) -> None:
    q, k, v = draw(1, 63, 3 * 2 * dim, dtype=dtype).chunk(3, dim=-1)
    check(f"D={dim}", 2, q, (k, v))


@pytest.mark.parametrize(("rows", "queries", "keys"), [(1, 1, 1), (3, 130, 63), (1, 5, 256)])
def test_sizes(dtype: torch.dtype, rows: int, queries: int, keys: int) -> None:
    q = draw(rows, queries, 48, dtype=dtype)
    check("one head", 1, q, pair(rows, keys, 48, dtype=dtype))
    check("three heads", 3, q, pair(rows, keys, 48, dtype=dtype))


def test_text(dtype: torch.dtype) -> None:
    q, (k, v) = draw(3, 150, 80, dtype=dtype), pair(3, 77, 80, dtype=dtype)
    out = check("text", 2, q, (k, v))
    # views, whatever their alignment, change nothing
    assert torch.equal(attention(strided(q), k, v.contiguous(), 2), out)
    key, value = (torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (k, v))
    assert key.data_ptr() % 16
    assert torch.equal(attention(q, key, value, 2), out)


def test_two_sources(dtype: torch.dtype) -> None:
    q = draw(3, 70, 80, dtype=dtype)
    own, more = pair(3, 70, 80, dtype=dtype), pair(3, 9, 80, dtype=dtype, seed=2)
    check("two sources", 2, q, own, more)
    check("the other way round", 2, q, more, own)
    halves = [tuple(x[:, half] for x in own) for half in (slice(0, 64), slice(64, 70))]
    check("one source in halves", 2, q, *halves)  # type: ignore[arg-type]


def test_a_source_that_all_rows_share(dtype: torch.dtype) -> None:
    q, own = draw(3, 33, 40, dtype=dtype), pair(3, 20, 40, dtype=dtype)
    key, value = (x.expand(3, -1, -1) for x in pair(1, 30, 40, dtype=dtype, seed=2))
    assert key.stride(0) == 0
    check("shared", 1, q, own, (key, value))


@pytest.mark.parametrize(("groups", "rows", "positions"), [(2, 2, 18), (3, 1, 1)])
def test_rows_share_a_source(dtype: torch.dtype, groups: int, rows: int, positions: int) -> None:
    """Both branches' queries over the keys of both, which stay where they are."""
    q, k, v = draw(2 * rows, positions, 240, dtype=dtype).chunk(3, dim=-1)
    q = q.repeat(groups, 1, 1)[: groups * rows]
    whole = [torch.cat(x.chunk(2), 1).repeat(groups, 1, 1) for x in (k, v)]
    actual = attention(q, k[:rows], v[:rows], 2, k[rows:], v[rows:])
    expected = plain(q, *whole, 2)
    exact = plain(*(x.double() for x in (q, *whole)), 2)
    assert_within_budget("shared", actual, expected, exact)
    # one source alone
    alone = [x[:rows].repeat(groups, 1, 1) for x in (k, v)]
    assert torch.equal(attention(q, k[:rows], v[:rows], 2), attention(q, *alone, 2))


def test_rows_beyond_32_bits() -> None:
    q, (k, v) = draw(3, 5, 40, dtype=torch.bfloat16), pair(3, 7, 40, dtype=torch.bfloat16)
    # 4 GiB of addresses, of which a few pages are touched; the stride itself fits in 32 bits
    far = torch.empty(2**31 + 2**10, dtype=torch.bfloat16).as_strided((3, 7, 40), (2**30, 80, 1))
    far.copy_(k)
    assert torch.equal(attention(q, far, v, 1), attention(q, k, v, 1))


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (30 * draw(1, 40, 40, dtype=torch.float32, seed=s) for s in range(3))
    check("large scores", 1, q, (k, v))


@pytest.mark.parametrize("keys", [77, 200])
def test_every_candidate(dtype: torch.dtype, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = candidates(80, dtype, keys)
    assert default_config(80, dtype, keys) in listed
    q, source = draw(1, 70, 80, dtype=dtype), pair(1, keys, 80, dtype=dtype)
    # the name in the package is the op's module
    module = importlib.import_module("dualdiff_engine.ops.triton.attention")
    # stages are nothing to the interpreter
    for config in {tuple(c.blocks.values()): c for c in listed}.values():
        monkeypatch.setattr(module, "default_config", lambda *_, config=config: config)
        check(str(config), 1, q, source)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(5, 40)] * 3, r"query \[N, S, C\].*got \[5, 40\]"),
        ([(2, 5, 42)] * 3, r"C of 4 heads.*got \[2, 5, 42\]"),
        ([(2, 5, 4 * 257)] * 3, r"heads of at most 256 columns; got 257"),
        ([(2, 5, 40), (2, 6, 40), (2, 5, 40)], r"\[2, L, 40\]; got \[2, 6, 40\], \[2, 5, 40\]"),
        ([(2, 5, 40), (3, 5, 40), (3, 5, 40)], r"\[2, L, 40\]; got \[3, 5, 40\], \[3, 5, 40\]"),
        ([(2, 5, 40), (2, 5, 44), (2, 5, 44)], r"\[2, L, 40\]; got \[2, 5, 44\], \[2, 5, 44\]"),
        ([(2, 5, 40), (2, 40), (2, 40)], r"\[2, L, 40\]; got \[2, 40\], \[2, 40\]"),
    ],
)
def test_wrong_shapes(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*(torch.zeros(shape) for shape in shapes), 4)


def test_wrong_sources_types_and_strides() -> None:
    x = torch.zeros(1, 40, 40)
    with pytest.raises(ValueError, match="both more_key and more_value, or neither"):
        attention(x, x, x, 1, x)
    with pytest.raises(ValueError, match=r"\[1, L, 40\]; got \[1, 40, 40\], \[1, 39, 40\]"):
        attention(x, x, x, 1, x, x[:, 1:])
    with pytest.raises(ValueError, match=r"of one dtype; got torch\.float16, torch\.float32"):
        attention(x, x, x.half(), 1)
    with pytest.raises(ValueError, match=r"adjacent columns.*strides \[1600, 1, 40\]"):
        attention(x, x.mT, x, 1)


def arguments(more: bool) -> tuple[Any, ...]:
    x, (k, v) = draw(1, 5, 40, dtype=torch.float32), pair(1, 6, 40, dtype=torch.float32)
    return (x, k, v, 2, *(pair(1, 3, 40, dtype=torch.float32, seed=2) if more else ()))


@pytest.mark.parametrize("more", [False, True])
def test_registration(monkeypatch: pytest.MonkeyPatch, more: bool) -> None:
    monkeypatch.undo()
    torch.library.opcheck(attention, arguments(more))
    compiled = torch.compile(lambda *a: attention(*a) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments(more)), attention(*arguments(more)) * 2)


@pytest.mark.parametrize(("more", "keys"), [(False, 6), (True, 9)])
def test_flops(more: bool, keys: int) -> None:
    with FlopCounterMode(display=False) as counter:
        attention(*arguments(more))
    assert counter.get_total_flops() == 4 * 5 * keys * 40
