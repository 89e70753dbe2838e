"""Every op of every CPU backend against fp64, on odd shapes, strided inputs and poisoned memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.exchanges.interaction import fold_interaction
from dualdiff_engine.exchanges.kind import Affine
from dualdiff_engine.ops import NAMES, Ops, bind, reference
from op_inputs import draw, interaction, poison, strided, unfolded_interaction
from tolerance import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16]
# odd sizes, one row, sizes below and above a vector
SHAPES = [(63, 48), (1, 16), (130, 40)]


# triton's are tested in tests/ops/interpreter
@pytest.fixture(params=["native", "onednn", "widened", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def ops(backend: str, dtype: torch.dtype) -> Ops:
    try:
        return bind(backend, dtype=dtype)
    # this machine may lack the extension, or the instructions
    except BackendError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_branch_linear(
    ops: Ops, dtype: torch.dtype, rows: int, channels: int, branches: int, bias: bool
) -> None:
    x = draw(branches, rows, channels, dtype=dtype)
    w = draw(branches, 24, channels, dtype=dtype, seed=1)
    b = draw(24, dtype=dtype, seed=2) if bias else None
    exact = torch.einsum("fmc,fdc->fmd", x.double(), w.double()) + (b.double() if bias else 0)
    eager = torch.stack([F.linear(x[f], w[f], b) for f in range(branches)])
    assert_within_budget("branch_linear", ops.branch_linear(x, w, b), eager, exact)
    assert_within_budget("strided", ops.branch_linear(strided(x), w, b), eager, exact)


@pytest.mark.parametrize("bias", [True, False])
def test_plain_branch_linear_writes_where_it_belongs(dtype: torch.dtype, bias: bool) -> None:
    """No more is copied than by two products, and the result is theirs, bit for bit."""

    def copies(run: Callable[[], object]) -> int:
        with torch.profiler.profile() as profile:
            run()
        return sum(e.count for e in profile.key_averages() if e.key == "aten::copy_")

    x = draw(2, 3, 21, 48, dtype=dtype)
    w = draw(2, 24, 48, dtype=dtype, seed=1)
    b = draw(24, dtype=dtype, seed=2) if bias else None
    apart = [x[f].flatten(0, 1) for f in range(2)]
    plain = copies(lambda: [F.linear(rows, w[f], b) for f, rows in enumerate(apart)])
    assert copies(lambda: reference.branch_linear(x, w, b)) == plain
    out = reference.branch_linear(x, w, b)
    assert torch.equal(out, torch.stack([F.linear(x[f], w[f], b) for f in range(2)]))


def test_branch_linear_joins_the_background(ops: Ops, dtype: torch.dtype) -> None:
    rows, batch, positions, channels, width = 2, 3, 5, 16, 12
    x = draw(2, rows * batch * positions, channels, dtype=dtype)
    w = draw(2, 18, channels, dtype=dtype, seed=1)
    background_kv = draw(rows, positions, width, dtype=dtype, seed=2)
    keep = torch.tensor([0.75], dtype=dtype)

    def joined(y: Tensor, background_kv: Tensor, keep: Tensor) -> Tensor:
        y = y.clone()
        own = y[0].view(rows, batch, positions, 18)[..., -width:]
        own.copy_(keep * own + background_kv[:, None])
        return y

    exact = joined(x.double() @ w.double().mT, background_kv.double(), keep.double())
    eager = joined(x @ w.mT, background_kv, keep)
    actual = ops.branch_linear(x, w, None, background_kv, keep)
    assert_within_budget("branch_linear with background_kv", actual, eager, exact)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_adds_a_residual(ops: Ops, dtype: torch.dtype, bias: bool) -> None:
    x, w = draw(3, 63, 48, dtype=dtype), draw(24, 48, dtype=dtype, seed=1)
    residual = draw(3, 63, 24, dtype=dtype, seed=2)
    b = draw(24, dtype=dtype, seed=3) if bias else None
    exact = x.double() @ w.double().T + residual.double() + (b.double() if b is not None else 0)
    eager = F.linear(x, w, b) + residual
    before = residual.clone()
    assert_within_budget("linear", ops.linear(x, w, b, residual), eager, exact)
    assert torch.equal(residual, before)


def test_attention_joins_a_second_source(ops: Ops, dtype: torch.dtype) -> None:
    q, k, v = (draw(2, 9, 80, dtype=dtype, seed=s) for s in range(3))
    more_k, more_v = (draw(2, 13, 80, dtype=dtype, seed=s) for s in (3, 4))
    keys, values = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
    exact = reference.attention(q.double(), keys.double(), values.double(), 2)
    eager = reference.attention(q, keys, values, 2)
    assert_within_budget("attention", ops.attention(q, k, v, 2, more_k, more_v), eager, exact)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """Row after row. bias [N, S, L] joins the scores of every head."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores if bias is None else scores + bias[:, None].to(scores)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("groups", "rows", "positions", "length"), [(2, 2, 63, 63), (2, 3, 1, 1), (3, 1, 17, 130)]
)
@pytest.mark.parametrize("joined", [True, False])
def test_rows_share_a_source(
    ops: Ops, dtype: torch.dtype, groups: int, rows: int, positions: int, length: int, joined: bool
) -> None:
    """Row n of the queries reads row n % N' of the keys, without a copy of them."""
    q = draw(groups * rows, positions, 80, dtype=dtype)
    packed = draw(2 * rows, length, 160, dtype=dtype, seed=1)
    (k, more_k), (v, more_v) = (x.chunk(2) for x in packed.chunk(2, dim=-1))
    keys, values = (torch.cat(x, 1) for x in ((k, more_k), (v, more_v))) if joined else (k, v)
    keys, values = keys.repeat(groups, 1, 1), values.repeat(groups, 1, 1)
    exact = plain_attention(q.double(), keys.double(), values.double(), 2)
    actual = ops.attention(strided(q), k, v, 2, *((more_k, more_v) if joined else ()))
    assert actual.is_contiguous()
    assert_within_budget("attention", actual, plain_attention(q, keys, values, 2), exact)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("queries", "keys"), [(63, 63), (5, 77), (1, 1)])
def test_attention(ops: Ops, dtype: torch.dtype, heads: int, queries: int, keys: int) -> None:
    channels = 40 * heads
    q = draw(3, queries, channels, dtype=dtype)
    kv = draw(3, keys, 2 * channels, dtype=dtype, seed=1)
    k, v = kv.chunk(2, dim=-1)

    exact = plain_attention(q.double(), k.double(), v.double(), heads)
    actual = ops.attention(strided(q), k, v, heads)
    assert actual.is_contiguous()
    assert_within_budget("attention", actual, plain_attention(q, k, v, heads), exact)


def aligned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    chosen: list[int],
    scale: float,
    graphic: Tensor | None,
    strength: float,
) -> Tensor:
    """As the formula is written: the scores of all heads first, then the mean over some tokens."""
    branches, rows = query.shape[:2]
    width = query.shape[-1] // heads
    # [2, R, B, H, S, D] and [2, R, 1, H, L, D]
    q = query.unflatten(-1, (heads, width)).transpose(-2, -3)
    k, v = (x.view(branches, rows, 1, -1, heads, width).transpose(-2, -3) for x in (key, value))
    scores = q @ k.transpose(-1, -2) / math.sqrt(width)
    mean = scores[..., chosen].mean((-1, -3))
    centred = mean - mean.mean(-1, keepdim=True)
    deviation = centred.square().mean(-1, keepdim=True).sqrt()
    standard = torch.where(deviation > 0, centred / deviation, 0.0)
    bias = scale * standard.flip(0)
    if graphic is not None:
        bias = bias + strength * (2 * graphic - 1)
    drawn = torch.zeros_like(scores)
    drawn[..., chosen] = bias[:, :, :, None, :, None].to(scores)
    out = torch.softmax(scores + drawn, dim=-1) @ v
    return out.transpose(-2, -3).flatten(-2)


def alignment(dtype: torch.dtype, shape: tuple[int, ...], length: int) -> tuple[Tensor, ...]:
    """query, key and value of a packed projection."""
    query = draw(*shape, dtype=dtype)
    packed = draw(2 * shape[1], length, 2 * shape[-1], dtype=dtype, seed=1)
    return query, *packed.chunk(2, dim=-1)


@pytest.mark.parametrize(
    ("shape", "length", "heads", "chosen"),
    [
        ((2, 2, 3, 63, 80), 77, 2, [3, 4]),
        ((2, 1, 1, 1, 16), 1, 1, [0]),
        ((2, 2, 1, 530, 48), 9, 3, [8]),
    ],
)
@pytest.mark.parametrize("graphic", [None, "shared", "own"])
def test_align(
    ops: Ops,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    length: int,
    heads: int,
    chosen: list[int],
    graphic: str | None,
) -> None:
    query, key, value = alignment(dtype, shape, length)
    _, _, pairs, positions, _ = shape
    mean_key = key[:, chosen].mean(1)
    tokens = torch.zeros(length, dtype=dtype)
    tokens[chosen] = 1
    scale = torch.tensor([0.7]).to(dtype)
    where = {None: (), "shared": (positions,), "own": (pairs, positions)}[graphic]
    drawn = draw(*where, dtype=dtype, seed=3).sigmoid() if where else None
    given = (mean_key, tokens, scale, drawn, 2.5)
    wide = None if drawn is None else drawn.double()
    # the mean key is an argument of its own, rounded as it is
    exact = reference.align(
        *(x.double() for x in (query, key, value)), heads,
        *(x.double() for x in given[:3]), wide, 2.5,
    )  # fmt: skip
    eager = aligned(query, key, value, heads, chosen, float(scale), drawn, 2.5)
    actual = ops.align(query, key, value, heads, *given)
    assert actual.is_contiguous()
    assert_within_budget("align", actual, eager, exact)


@pytest.mark.parametrize("graphic", [True, False])
def test_the_reference_of_align_is_the_formula(graphic: bool) -> None:
    query, key, value = alignment(torch.float64, (2, 2, 3, 63, 80), 77)
    chosen, scale = [3, 4, 70], torch.tensor([0.7], dtype=torch.float64)
    tokens = torch.zeros(77, dtype=torch.float64)
    tokens[chosen] = 1
    drawn = draw(3, 63, dtype=torch.float64).sigmoid() if graphic else None
    actual = reference.align(
        query, key, value, 2, key[:, chosen].mean(1), tokens, scale, drawn, 2.5
    )
    written = aligned(query, key, value, 2, chosen, 0.7, drawn, 2.5)
    torch.testing.assert_close(actual, written, rtol=0, atol=1e-13)


def test_align_by_nothing_is_attention(ops: Ops, dtype: torch.dtype) -> None:
    query, key, value = alignment(dtype, (2, 2, 3, 63, 80), 77)
    tokens = draw(77, dtype=dtype).sign().clamp_min(0)
    off = torch.zeros(1, dtype=dtype)
    merged = query.view(4, -1, 80)
    exact = reference.attention(merged.double(), key.double(), value.double(), 2)
    eager = reference.attention(merged, key, value, 2)
    actual = ops.align(query, key, value, 2, key[:, 0].contiguous(), tokens, off)
    assert_within_budget("align", actual.view(4, -1, 80), eager, exact)


def test_a_flat_map_draws_nothing(ops: Ops, dtype: torch.dtype) -> None:
    """All positions alike: what sums differ by is rounding, and is not blown up to a deviation."""
    query, key, value = alignment(dtype, (2, 1, 1, 1, 80), 7)
    query = 30 * query.expand(2, 1, 1, 63, 80).contiguous()
    tokens = torch.ones(7, dtype=dtype).cumsum(0).eq(2).to(dtype)
    scale = torch.full((1,), 100.0, dtype=dtype)
    given = (key[:, 1].contiguous(), tokens)
    off = ops.align(query, key, value, 2, *given, 0 * scale)
    assert torch.equal(ops.align(query, key, value, 2, *given, scale), off)


def test_align_and_merge_learn() -> None:
    """Gradients of the reference, which a trainer uses, by differences; none if flat."""
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value = alignment(torch.float64, (2, 1, 2, 4, 4), 3)
        tokens = torch.tensor([0, 1, 1], dtype=torch.float64)
        given = (key[:, 1:].mean(1), tokens, torch.tensor([0.7], dtype=torch.float64))
        learnt = [x.clone().requires_grad_() for x in (query, key, value, *given)]
        assert torch.autograd.gradcheck(lambda q, k, v, *x: reference.align(q, k, v, 2, *x), learnt)
        flat = query[..., :1, :].expand_as(query).clone().requires_grad_()
        reference.align(flat, key, value, 2, *given).sum().backward()
        assert flat.grad is not None
        assert flat.grad.isfinite().all()
        shapes = ((2, 3, 4), (2, 4, 4), (2, 3, 4))
        merged = [draw(*x, dtype=torch.float64, seed=s) for s, x in enumerate(shapes)]
        assert torch.autograd.gradcheck(reference.merge, [x.requires_grad_() for x in merged])


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_merge(ops: Ops, dtype: torch.dtype, rows: int, channels: int) -> None:
    x, residual = (draw(2, rows, channels, dtype=dtype, seed=s) for s in (0, 7))
    weight = draw(2, channels, channels, dtype=dtype, seed=1) / channels**0.5

    def plain(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        normed = F.layer_norm(x, (channels,), eps=reference.INTERACTION_EPS)
        moved = [(normed[1 - f] - normed[f]) @ weight[f].mT for f in range(2)]
        return residual + x + torch.stack(moved)

    exact = plain(x.double(), weight.double(), residual.double())
    eager = plain(x, weight, residual)
    before = x.clone(), residual.clone()
    for name, given in (("merge", x), ("strided", strided(x))):
        actual = ops.merge(given, weight, residual)
        assert_within_budget(name, actual, eager, exact, terms=channels)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    nothing = ops.merge(x, torch.zeros_like(weight), residual)
    assert torch.equal(nothing, (x.float() + residual.float()).to(dtype))


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_exchange_is_the_unfolded_interaction(
    ops: Ops, dtype: torch.dtype, rows: int, channels: int
) -> None:
    x = draw(2, rows, channels, dtype=dtype)
    residual = draw(2, rows, channels, dtype=dtype, seed=7)
    parts = interaction(channels, dtype)
    wide = {n: Affine(a.weight.double(), a.bias.double()) for n, a in parts.items()}
    exact = unfolded_interaction(x.double(), wide) + residual.double()
    eager = unfolded_interaction(x, parts) + residual
    folded = fold_interaction(parts, torch.empty(0, dtype=torch.float64))
    weights = [
        folded[name].to(dtype)
        for name in ("gate_weight", "gate_bias", "value_weight", "value_bias")
    ]
    before = x.clone(), residual.clone()
    for name, given in (("exchange", x), ("strided", strided(x))):
        actual = ops.exchange(given, *weights, residual)
        assert_within_budget(name, actual, eager, exact, terms=channels)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_fold_of_the_interaction_is_exact() -> None:
    x = draw(2, 63, 48, dtype=torch.float64)
    parts = interaction(48, torch.float64)
    folded = fold_interaction(parts, x)
    out = reference.exchange(
        x,
        folded["gate_weight"],
        folded["gate_bias"],
        folded["value_weight"],
        folded["value_bias"],
        torch.zeros_like(x),
    )
    # the gate is kept in fp32 whatever the input
    assert torch.allclose(out, unfolded_interaction(x, parts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(5, 7), (1, 1)])
def test_group_norm_silu(ops: Ops, dtype: torch.dtype, size: tuple[int, int]) -> None:
    x = draw(3, 48, *size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w, b = draw(48, dtype=dtype, seed=1), draw(48, dtype=dtype, seed=2)
    before = x.clone()

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 8, w, b, 1e-5))

    actual = ops.group_norm_silu(x, 8, w, b, 1e-5)
    assert actual.is_contiguous(memory_format=torch.channels_last)
    exact = eager(x.double(), w.double(), b.double())
    assert_within_budget("group_norm_silu", actual, eager(x, w, b), exact)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("rows", "channels"), SHAPES)
def test_geglu(ops: Ops, dtype: torch.dtype, rows: int, channels: int) -> None:
    x = draw(3, rows, channels, dtype=dtype)
    w, b = draw(96, channels, dtype=dtype, seed=1), draw(96, dtype=dtype, seed=2)

    def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        value, gate = F.linear(x, w, b).chunk(2, dim=-1)
        return value * F.gelu(gate)

    exact = eager(x.double(), w.double(), b.double())
    assert_within_budget("geglu", ops.geglu(x, w, b), eager(x, w, b), exact)


def test_guided_step(ops: Ops, dtype: torch.dtype) -> None:
    noise = draw(2, 2, 3, 4, 5, 6, dtype=dtype)
    uncond, cond = noise[:, 0].double(), noise[:, 1].double()
    exact = uncond + 2.5 * (cond - uncond)
    eager = noise[:, 0].float() + 2.5 * (noise[:, 1].float() - noise[:, 0].float())
    assert_within_budget("guided_step", ops.guided_step(noise, 2.5), eager, exact)


def test_auto_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    table = {row.op: row for row in bind("auto").table}
    assert set(table) == set(NAMES)
    assert table["exchange"].backend == "reference"
    assert "without oneDNN" in table["exchange"].reason


def test_explicit_backend_raises_with_the_reason() -> None:
    with pytest.raises(BackendError, match=r"'onednn' cannot be used.*no torch\.float64 product"):
        bind("onednn", dtype=torch.float64)
    with pytest.raises(BackendError, match=r"'triton' cannot be used.*needs an NVIDIA GPU"):
        bind("triton")
    with pytest.raises(BackendError, match="no backend is called 'cuda'; there are: auto, triton"):
        bind("cuda")


def test_backends_of_single_ops() -> None:
    table = {row.op: row.backend for row in bind("exchange=reference, geglu=onednn").table}
    auto = {row.op: row.backend for row in bind("auto").table}
    assert table == auto | {"exchange": "reference", "geglu": "onednn"}
    with pytest.raises(BackendError, match=r"'attention=onednn' cannot be used: not onednn"):
        bind("attention=onednn")
    with pytest.raises(BackendError, match="'attention=xformers' cannot be used: not xformers"):
        bind("attention=xformers")
    with pytest.raises(BackendError, match="no op is called 'softmax'; there are: linear"):
        bind("softmax=native")
    with pytest.raises(BackendError, match="no backend is called ''"):
        bind("attention=")


def test_a_backend_without_an_op_leaves_it_to_the_reference() -> None:
    table = {row.op: row for row in bind("onednn").table}
    assert table["attention"].backend == "reference"
    assert "not onednn: has no attention" in table["attention"].reason
