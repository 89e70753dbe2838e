"""Attention in one pass, at the head dimensions of SD-1.5 without padding them to powers of two.

Tensor cores want blocks of a power of two columns; 40, 80 and 160 would pay for 64, 128 and 256.
Each head is cut into a power of two and a smaller one instead, 32 + 16, 64 + 16 and 128 + 32:
two products give the scores, two give the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import contracts, flops
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation
from dualdiff_engine.ops.triton.tuning import Config

# of SD-1.5
DIMS = (40, 80, 160)
LARGEST_DIM = 256
# a prompt has no more: then memory traffic of the queries counts, not arithmetic
FEW_KEYS = 128
# bytes of the widest copy
VECTOR = 16
# rows of a tile are addressed in 32 bits from its first; tiles have at most 2^8 rows
LARGEST_STRIDE = 2**23
LOG2_E = math.log2(math.e)


@triton.jit
def _tile(
    rows_ptr,  # [rows, D] of one head, rows `stride` apart
    stride,
    size,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(pointers, mask) of BLOCK rows and some columns, PART = (first, how many).

    The mask leaves out rows from `size` on, and columns from DIM on.
    """
    offsets_m = tl.arange(0, BLOCK)[:, None]
    offsets_d = PART[0] + tl.arange(0, PART[1])[None, :]
    pointers = rows_ptr + offsets_m * stride + offsets_d
    # of strides the compiler is told nothing else
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, 16])
    return pointers, (offsets_m < size) & (offsets_d < DIM)


@triton.jit
def _load(
    rows_ptr,  # [rows, D] of one head, rows `stride` apart
    stride,
    size,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The values of `_tile`, with zeros where it is masked."""
    pointers, mask = _tile(rows_ptr, stride, size, BLOCK, PART, DIM, ALIGNED)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _zeros(BLOCK: tl.constexpr, PART: tl.constexpr):
    """[BLOCK, columns of the part] in fp32."""
    # in a list, an element of a constexpr is no constexpr
    columns: tl.constexpr = PART[1]
    return tl.zeros([BLOCK, columns], tl.float32)


@triton.jit
def _online_softmax_update(scores, scale, running_max, running_sum):
    """(weights, alpha, running_max, running_sum) once a block of scores [M, N] has joined.

    In base 2: running_max = max s · scale, running_sum = sum 2^(s · scale - running_max).
    weights [M, N] are the terms of that sum for this block, alpha [M] is what earlier ones are
    multiplied by, now that the maximum has grown.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 1) * scale)
    alpha = tl.exp2(running_max - new_max)
    # one multiply-add per score
    weights = tl.exp2(scores * scale - new_max[:, None])
    return weights, alpha, new_max, running_sum * alpha + tl.sum(weights, 1)


@triton.jit
def _attend(
    state,  # (accumulators, running_max [M], running_sum [M])
    queries,  # ([M, FIRST], [M, SECOND]) or the first alone, as accumulators
    source,  # (keys, values): pointers to [length, D]
    strides,  # of keys and of values, between rows
    length,
    scale,
    drawn,  # (bias [M], pointer to tokens [length]) or None
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The state once `length` keys and values have joined.

    accumulators = sum 2^(s - running_max) v over keys so far, s their scores · scale. drawn: the
    scores of tokens, which are 1, get a bias; those of the others, 0, do not.
    """
    accumulators, running_max, running_sum = state
    key_ptr, value_ptr = source
    stride_key, stride_value = strides
    for start in range(0, length, BLOCK_N):
        remaining = BLOCK_N if EVEN else length - start
        key_0 = _load(key_ptr, stride_key, remaining, BLOCK_N, FIRST, DIM, ALIGNED)
        scores = tl.dot(queries[0], tl.trans(key_0), input_precision="ieee")
        if SECOND is not None:
            key_1 = _load(key_ptr, stride_key, remaining, BLOCK_N, SECOND, DIM, ALIGNED)
            scores = tl.dot(queries[1], tl.trans(key_1), scores, input_precision="ieee")
        if drawn is not None:
            offsets_n = start + tl.arange(0, BLOCK_N)
            tokens = tl.load(drawn[1] + offsets_n, mask=offsets_n < length, other=0.0)
            scores += drawn[0][:, None] * tokens.to(tl.float32)[None, :]
        if not EVEN:
            valid = tl.arange(0, BLOCK_N)[None, :] < remaining
            scores = tl.where(valid, scores, float("-inf"))
        weights, alpha, running_max, running_sum = _online_softmax_update(
            scores, scale, running_max, running_sum
        )
        value_0 = _load(value_ptr, stride_value, remaining, BLOCK_N, FIRST, DIM, ALIGNED)
        weights = weights.to(value_0.dtype)
        faded = accumulators[0] * alpha[:, None]
        part_0 = tl.dot(weights, value_0, faded, input_precision="ieee")
        if SECOND is not None:
            value_1 = _load(value_ptr, stride_value, remaining, BLOCK_N, SECOND, DIM, ALIGNED)
            faded = accumulators[1] * alpha[:, None]
            accumulators = (part_0, tl.dot(weights, value_1, faded, input_precision="ieee"))
        else:
            accumulators = (part_0,)
        # pointers advance rather than offsets grow: a row may lie beyond 2^31 elements
        key_ptr += BLOCK_N * stride_key
        value_ptr += BLOCK_N * stride_value
    return accumulators, running_max, running_sum


# all integers: ALIGNED says what matters of them, so that no size asks for another compilation.
# strides are scalars here and tuples inside: Triton specialises what is in a tuple all the same
@triton.jit(do_not_specialize=range(8, 23))
def _attention_kernel(
    query_ptr,  # [N, S, H·D]
    key_ptr,  # [N', L, H·D]
    value_ptr,  # [N', L, H·D]
    more_key_ptr,  # [N', L', H·D]
    more_value_ptr,  # [N', L', H·D]
    bias_ptr,  # [N, S] fp32, or None
    tokens_ptr,  # [L], or None
    out_ptr,  # [N, S, H·D], contiguous
    # in elements, along N and along S, L or L'
    stride_query_n, stride_query_s,
    stride_key_n, stride_key_s,
    stride_value_n, stride_value_s,
    stride_more_key_n, stride_more_key_s,
    stride_more_value_n, stride_more_value_s,
    num_heads,
    positions,
    length,
    more_length,
    source_rows,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    JOINED: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head; S positions, L length, L' more_length, H num_heads, D = DIM.

    If SHARED, row n of the queries reads row n % N' of the keys, N' = source_rows; else N' = N.
    The bias of a query joins its scores of the tokens, before their scale.

    Grid (query blocks · heads, N), heads fastest: a head's columns of a row are 80 bytes at D = 40
    and neighbours share sectors of memory, so all heads of a block are read and written close in
    time.
    """
    head = tl.program_id(0) % num_heads
    start = tl.program_id(0) // num_heads * BLOCK_M
    row = tl.program_id(1).to(tl.int64)
    remaining = positions - start
    column = head * DIM
    query_ptr += row * stride_query_n + start.to(tl.int64) * stride_query_s + column
    query_0 = _load(query_ptr, stride_query_s, remaining, BLOCK_M, FIRST, DIM, ALIGNED)
    queries = (
        (query_0, _load(query_ptr, stride_query_s, remaining, BLOCK_M, SECOND, DIM, ALIGNED))
        if SECOND is not None
        else (query_0,)
    )
    drawn = None
    if bias_ptr is not None:
        offsets_m = start + tl.arange(0, BLOCK_M)
        bias_ptr += row * positions
        bias = tl.load(bias_ptr + offsets_m, mask=offsets_m < positions, other=0.0)
        drawn = (bias, tokens_ptr)
    zeros_0 = _zeros(BLOCK_M, FIRST)
    accumulators = (zeros_0, _zeros(BLOCK_M, SECOND)) if SECOND is not None else (zeros_0,)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    source_row = (tl.program_id(1) % source_rows).to(tl.int64) if SHARED else row
    source = (
        key_ptr + (source_row * stride_key_n + column),
        value_ptr + (source_row * stride_value_n + column),
    )
    state = _attend(
        (accumulators, running_max, running_sum), queries,
        source, (stride_key_s, stride_value_s), length, scale, drawn,
        BLOCK_N, FIRST, SECOND, DIM, ALIGNED, EVEN,
    )  # fmt: skip
    if JOINED:
        source = (
            more_key_ptr + (source_row * stride_more_key_n + column),
            more_value_ptr + (source_row * stride_more_value_n + column),
        )
        state = _attend(
            state, queries,
            source, (stride_more_key_s, stride_more_value_s), more_length, scale, None,
            BLOCK_N, FIRST, SECOND, DIM, ALIGNED, EVEN,
        )  # fmt: skip
    accumulators, running_max, running_sum = state
    normalizer = (1.0 / running_sum)[:, None]
    stride_out = num_heads * DIM
    out_ptr += (row * positions + start) * stride_out + column
    pointers, mask = _tile(out_ptr, stride_out, remaining, BLOCK_M, FIRST, DIM, ALIGNED)
    out = (accumulators[0] * normalizer).to(out_ptr.dtype.element_ty)
    tl.store(pointers, out, mask=mask)
    if SECOND is not None:
        pointers, mask = _tile(out_ptr, stride_out, remaining, BLOCK_M, SECOND, DIM, ALIGNED)
        out = (accumulators[1] * normalizer).to(out_ptr.dtype.element_ty)
        tl.store(pointers, out, mask=mask)


def split(dim: int) -> tuple[int, int]:
    """Widths of the blocks that hold a head's columns; (width, 0) where two are no narrower."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def shape_class(dim: int, dtype: torch.dtype, keys: int) -> str:
    """The row of a tuning table; keys of both sources."""
    return tuning.key(D=dim, dtype=dtype, few_keys=keys <= FEW_KEYS)


def attention_config(queries: int, keys: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": queries, "BLOCK_N": keys}, num_warps, num_stages)


def default_config(dim: int, dtype: torch.dtype, keys: int) -> Config:
    """What compiles without spills for every architecture; keys of both sources."""
    if dtype == torch.float32:
        # without tensor cores a thread holds rows of both factors of a product in registers
        queries = 64 if dim <= 80 else 32
        return attention_config(queries, 32 if dim <= 40 else 16, num_warps=8, num_stages=2)
    if dim > 160:
        return attention_config(64, 32, num_warps=8, num_stages=2)
    block = 64 if dim <= 80 and keys > FEW_KEYS else 32
    return attention_config(128, block, num_warps=8, num_stages=3)


def candidates(dim: int, dtype: torch.dtype, keys: int) -> list[Config]:
    """What is worth measuring, at most 8; the largest do not fit every architecture."""
    narrow = dim <= 80
    # queries, keys, warps, stages
    if dtype == torch.float32:
        tiles = [(16, 16, 4, 2), (16, 16, 4, 3), (32, 16, 8, 2), (32, 16, 8, 3)]
        tiles += [(64, 16, 8, 2), (64, 16, 8, 3), (64, 32, 8, 2), (64, 32, 8, 3)] * narrow
    elif keys <= FEW_KEYS:
        tiles = [(64, 32, 4, 2), (64, 32, 4, 3), (128, 16, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3)]
        tiles += [(64, 128, 4, 2), (128, 32, 4, 2), (128, 32, 4, 3)] * narrow
    elif narrow:
        tiles = [(64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3)]
        tiles += [(128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 2), (256, 64, 8, 3)]
    else:
        tiles = [(64, 32, 4, 2), (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 8, 2), (128, 32, 8, 3)]
        tiles += [(128, 64, 8, 2), (128, 64, 8, 3)]
    return [attention_config(*tile) for tile in tiles]


def _check(num_heads: int, *tensors: Tensor) -> None:
    """ValueError unless this kernel can read them: narrow heads, adjacent columns."""
    width = tensors[0].shape[-1] // num_heads
    if width > LARGEST_DIM:
        raise ValueError(f"attention takes heads of at most {LARGEST_DIM} columns; got {width}")
    for x in tensors:
        if x.stride(2) != 1 or x.stride(1) >= LARGEST_STRIDE:
            raise ValueError(
                f"attention takes adjacent columns, rows less than {LARGEST_STRIDE} apart; "
                f"got strides {list(x.stride())}"
            )


def _aligned(dim: int, *tensors: Tensor) -> bool:
    """Whether every head of every row starts on a multiple of a vector."""
    return all(
        x.data_ptr() % VECTOR == 0
        and all(step * x.element_size() % VECTOR == 0 for step in (dim, x.stride(0), x.stride(1)))
        for x in tensors
    )


def _constants(
    dim: int, config: Config, lengths: list[int], *, aligned: bool, shared: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments, without blocks; lengths of one or two sources."""
    first, second = split(dim)
    # without masks the compiler unrolls both loops of wide heads into more registers than there are
    even = all(length % config.blocks["BLOCK_N"] == 0 for length in lengths)
    return {
        "FIRST": (0, first),
        "SECOND": (first, second) if second else None,
        "DIM": dim,
        "ALIGNED": aligned,
        "EVEN": even and (len(lengths) == 1 or dim <= 80),
        "JOINED": len(lengths) == 2,
        "SHARED": shared,
    }


@torch.library.custom_op("dualdiff::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> Tensor:
    """softmax(q [k, k']ᵀ / sqrt(D)) [v, v'] per head, no mask, in one pass.

    query [N, S, C], key and value [N', L, C], more_key and more_value [N', L', C] or neither, N'
    dividing N, of one dtype, D = C / num_heads <= 256 -> [N, S, C] contiguous. Columns are
    adjacent; rows and batch have any strides. Scores, softmax and sums in fp32; weights
    are rounded to the dtype before they meet the values. Raises ValueError on other inputs.
    """
    contracts.attention(query, key, value, num_heads, more_key, more_value)
    sources = [(key, value)]
    if more_key is not None and more_value is not None:
        sources.append((more_key, more_value))
    keys = sum(source.shape[1] for source, _ in sources)
    default = default_config(query.shape[-1] // num_heads, query.dtype, keys)
    return launch("attention", default, query, sources, num_heads)


def launch(
    op: str,
    default: Config,
    query: Tensor,
    sources: list[tuple[Tensor, Tensor]],
    num_heads: int,
    drawn: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """The kernel, with the configuration that was measured for an op, or its default.

    sources: one or two pairs of keys and values. drawn: bias [N, S] in fp32, and tokens [L] of the
    one source. Raises ValueError on what it cannot read.
    """
    _check(num_heads, query, *(x for source in sources for x in source))
    rows, positions, channels = query.shape
    source_rows = sources[0][0].shape[0]
    dim, lengths = channels // num_heads, [source.shape[1] for source, _ in sources]
    keys = sum(lengths)
    config = tuning.choose(op, shape_class(dim, query.dtype, keys), default, query.device)
    out = query.new_empty(query.shape)
    # without a second source the first stands in its place, unread
    inputs = (query, *sources[0], *sources[-1])
    constants = _constants(
        dim,
        config,
        lengths,
        aligned=_aligned(dim, *inputs, out),
        shared=source_rows != rows,
    )
    blocks = triton.cdiv(positions, config.blocks["BLOCK_M"])
    _attention_kernel[blocks * num_heads, rows](
        *inputs, *drawn, out,
        *(step for x in inputs for step in x.stride()[:2]),
        num_heads, positions, lengths[0], lengths[-1], source_rows, LOG2_E / math.sqrt(dim),
        **constants, **config.arguments,
    )  # fmt: skip
    return out


@attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("attention", "attention")


# lengths of one or two sources; an odd second one asks for most registers; `connect` is shared by
# the branches
SOURCES = {"self": [4096], "text": [77], "joined": [4096, 4095], "connect": [4096, 4096]}


def compilation(
    op: str, dim: int, dtype: torch.dtype, name: str, config: Config, *, biased: bool = False
) -> Compilation:
    """What the compiler must know for one of SOURCES, with or without a bias."""
    constants = _constants(dim, config, SOURCES[name], aligned=True, shared=name == "connect")
    constants |= {} if biased else {"bias_ptr": None, "tokens_ptr": None}
    return listing.compilation(
        op, f"D={dim} {name}", _attention_kernel, dtype, config, constants,
        types={"bias_ptr": "*fp32"},
    )  # fmt: skip


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at the head dimensions of SD-1.5, with and without what the flags leave out.

    With every_candidate, what tuning may choose as well.
    """
    return [
        compilation("attention", dim, dtype, name, config)
        for dtype in TRITON_TYPES
        for dim in DIMS
        for name, lengths in SOURCES.items()
        for config in listing.configs(
            default_config(dim, dtype, sum(lengths)),
            candidates(dim, dtype, sum(lengths)),
            every_candidate,
        )
    ]
