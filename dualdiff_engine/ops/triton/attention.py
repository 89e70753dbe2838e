"""Attention in one pass, at the head dimensions of SD-1.5 without padding them to powers of two.

Tensor cores want blocks of a power of two columns; 40, 80 and 160 would pay for 64, 128 and 256.
Each head is cut into a power of two and a smaller one instead, 32 + 16, 64 + 16 and 128 + 32:
two products give the scores, two give the output.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.triton import tuning
from dualdiff_engine.ops.triton.tuning import TRITON_TYPES, Compilation, Config

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
def _part(
    rows_ptr,
    stride,
    size,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """(pointers, mask) of WIDTH columns from FIRST on; rows `size` and columns DIM bound them."""
    offsets_m = tl.arange(0, BLOCK)[:, None]
    offsets_d = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = rows_ptr + offsets_m * stride + offsets_d
    # of strides the compiler is told nothing else
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [1, 16])
    return pointers, (offsets_m < size) & (offsets_d < DIM)


@triton.jit
def _load(
    rows_ptr,
    stride,
    size,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The values of `_part`, with zeros where it is masked."""
    pointers, mask = _part(rows_ptr, stride, size, BLOCK, FIRST, WIDTH, DIM, ALIGNED)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _attend(
    query_0,
    query_1,
    out_0,
    out_1,
    total,
    peak,
    key_ptr,
    value_ptr,
    stride_key,
    stride_value,
    length,
    scale,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Join `length` keys and values to a running softmax.

    For scores s of a query so far, in base 2: peak = max s, total = sum 2^(s - peak),
    out = sum 2^(s - peak) v, whose columns are in two parts, as the query's.
    """
    for start in range(0, length, BLOCK_N):
        left = BLOCK_N if EVEN else length - start
        key_0 = _load(key_ptr, stride_key, left, BLOCK_N, 0, FIRST, DIM, ALIGNED)
        score = tl.dot(query_0, tl.trans(key_0), input_precision="ieee")
        if SECOND > 0:
            key_1 = _load(key_ptr, stride_key, left, BLOCK_N, FIRST, SECOND, DIM, ALIGNED)
            score = tl.dot(query_1, tl.trans(key_1), score, input_precision="ieee")
        if not EVEN:
            score = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1) * scale)
        fade = tl.exp2(peak - new_peak)
        # one multiply-add per score
        weight = tl.exp2(score * scale - new_peak[:, None])
        total = total * fade + tl.sum(weight, 1)
        peak = new_peak
        value_0 = _load(value_ptr, stride_value, left, BLOCK_N, 0, FIRST, DIM, ALIGNED)
        weight = weight.to(value_0.dtype)
        out_0 = tl.dot(weight, value_0, out_0 * fade[:, None], input_precision="ieee")
        if SECOND > 0:
            value_1 = _load(value_ptr, stride_value, left, BLOCK_N, FIRST, SECOND, DIM, ALIGNED)
            out_1 = tl.dot(weight, value_1, out_1 * fade[:, None], input_precision="ieee")
        # pointers advance rather than offsets grow: a row may lie beyond 2^31 elements
        key_ptr += BLOCK_N * stride_key
        value_ptr += BLOCK_N * stride_value
    return out_0, out_1, total, peak


# all integers: ALIGNED says what matters of them, so that no size asks for another compilation
@triton.jit(do_not_specialize=range(6, 20))
def _attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    more_key_ptr,
    more_value_ptr,
    out_ptr,
    stride_query_n,
    stride_query_s,
    stride_key_n,
    stride_key_s,
    stride_value_n,
    stride_value_s,
    stride_more_key_n,
    stride_more_key_s,
    stride_more_value_n,
    stride_more_value_s,
    num_heads,
    positions,
    length,
    more_length,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    DIM: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    JOINED: tl.constexpr,
):
    """BLOCK_M queries of one head; grid (query blocks · heads, N), heads fastest.

    A head's columns of a row are 80 bytes at D = 40: neighbours share sectors of memory, so all
    heads of a block are read and written close in time.
    """
    head = tl.program_id(0) % num_heads
    start = tl.program_id(0) // num_heads * BLOCK_M
    row = tl.program_id(1).to(tl.int64)
    left = positions - start
    column = head * DIM
    query_ptr += row * stride_query_n + start.to(tl.int64) * stride_query_s + column
    query_0 = _load(query_ptr, stride_query_s, left, BLOCK_M, 0, FIRST, DIM, ALIGNED)
    out_0 = tl.zeros([BLOCK_M, FIRST], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # without a second part its names stand for the first and are not used
    query_1, out_1 = query_0, out_0
    if SECOND > 0:
        query_1 = _load(query_ptr, stride_query_s, left, BLOCK_M, FIRST, SECOND, DIM, ALIGNED)
        out_1 = tl.zeros([BLOCK_M, SECOND], tl.float32)
    key_ptr += row * stride_key_n + column
    value_ptr += row * stride_value_n + column
    out_0, out_1, total, peak = _attend(
        query_0, query_1, out_0, out_1, total, peak,
        key_ptr, value_ptr, stride_key_s, stride_value_s, length, scale,
        BLOCK_N, FIRST, SECOND, DIM, ALIGNED, EVEN,
    )  # fmt: skip
    if JOINED:
        more_key_ptr += row * stride_more_key_n + column
        more_value_ptr += row * stride_more_value_n + column
        out_0, out_1, total, peak = _attend(
            query_0, query_1, out_0, out_1, total, peak,
            more_key_ptr, more_value_ptr, stride_more_key_s, stride_more_value_s, more_length,
            scale, BLOCK_N, FIRST, SECOND, DIM, ALIGNED, EVEN,
        )  # fmt: skip
    share = (1.0 / total)[:, None]
    stride_out = num_heads * DIM
    out_ptr += (row * positions + start) * stride_out + column
    pointers, mask = _part(out_ptr, stride_out, left, BLOCK_M, 0, FIRST, DIM, ALIGNED)
    tl.store(pointers, (out_0 * share).to(out_ptr.dtype.element_ty), mask=mask)
    if SECOND > 0:
        pointers, mask = _part(out_ptr, stride_out, left, BLOCK_M, FIRST, SECOND, DIM, ALIGNED)
        tl.store(pointers, (out_1 * share).to(out_ptr.dtype.element_ty), mask=mask)


def split(dim: int) -> tuple[int, int]:
    """Widths of the blocks that hold a head's columns; (width, 0) where two are no narrower."""
    whole = max(16, triton.next_power_of_2(dim))
    first = whole // 2
    second = max(16, triton.next_power_of_2(dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def shape_class(dim: int, dtype: torch.dtype, keys: int) -> str:
    """The row of a tuning table; keys of both sources."""
    kind = str(dtype).removeprefix("torch.")
    return tuning.key(D=dim, dtype=kind, few_keys=keys <= FEW_KEYS)


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


def _check(query: Tensor, num_heads: int, sources: list[tuple[Tensor, Tensor]]) -> None:
    """ValueError unless heads are whole, keys and values fit the query and columns are adjacent."""
    shape = list(query.shape)
    if query.dim() != 3 or shape[-1] % num_heads or shape[-1] > LARGEST_DIM * num_heads:
        raise ValueError(
            f"attention takes query [N, S, C], C of {num_heads} heads of at most {LARGEST_DIM} "
            f"columns; got {shape}"
        )
    expected = f"[{shape[0]}, L, {shape[2]}]"
    for key, value in sources:
        if key.dim() != 3 or key.shape != value.shape or key.shape[::2] != query.shape[::2]:
            raise ValueError(
                f"attention takes keys and values {expected}; "
                f"got {list(key.shape)}, {list(value.shape)}"
            )
    for x in (query, *(x for source in sources for x in source)):
        if x.stride(2) != 1 or x.stride(1) >= LARGEST_STRIDE or x.dtype != query.dtype:
            raise ValueError(
                f"attention takes adjacent columns of {query.dtype}, rows less than "
                f"{LARGEST_STRIDE} apart; got {x.dtype}, strides {list(x.stride())}"
            )


def _aligned(dim: int, *tensors: Tensor) -> bool:
    """Whether every head of every row starts on a multiple of a vector."""
    return all(
        x.data_ptr() % VECTOR == 0
        and all(step * x.element_size() % VECTOR == 0 for step in (dim, x.stride(0), x.stride(1)))
        for x in tensors
    )


def _constants(dim: int, config: Config, lengths: list[int], aligned: bool) -> dict[str, int]:
    """The kernel's compile-time arguments; lengths of one or two sources."""
    first, second = split(dim)
    return {
        **config.blocks,
        "FIRST": first,
        "SECOND": second,
        "DIM": dim,
        "ALIGNED": aligned,
        "EVEN": all(length % config.blocks["BLOCK_N"] == 0 for length in lengths),
        "JOINED": len(lengths) == 2,
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

    query [N, S, C], key and value [N, L, C], more_key and more_value [N, L', C] or neither, of one
    dtype, D = C / num_heads <= 256 -> [N, S, C] contiguous. Columns are adjacent; rows and batch
    have any strides, 0 where all of them share a source. Scores, softmax and sums in fp32; weights
    are rounded to the dtype before they meet the values. Raises ValueError on other inputs.
    """
    sources = [(key, value)]
    if more_key is not None and more_value is not None:
        sources.append((more_key, more_value))
    elif more_key is not more_value:
        raise ValueError("attention takes both more_key and more_value, or neither; got one")
    _check(query, num_heads, sources)
    rows, positions, channels = query.shape
    dim, lengths = channels // num_heads, [source.shape[1] for source, _ in sources]
    keys = sum(lengths)
    config = tuning.choose(
        "attention",
        shape_class(dim, query.dtype, keys),
        default_config(dim, query.dtype, keys),
        query.device,
    )
    out = query.new_empty(query.shape)
    # without a second source the first stands in its place, unread
    inputs = (query, *sources[0], *sources[-1])
    constants = _constants(dim, config, lengths, _aligned(dim, *inputs, out))
    blocks = triton.cdiv(positions, config.blocks["BLOCK_M"])
    _attention_kernel[blocks * num_heads, rows](
        *inputs, out,
        *(step for x in inputs for step in x.stride()[:2]),
        num_heads, positions, lengths[0], lengths[-1], LOG2_E / math.sqrt(dim),
        **{**constants, **config.arguments},
    )  # fmt: skip
    return out


@attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("attention", "attention")


def _compilation(dtype: torch.dtype, dim: int, name: str, *lengths: int) -> Compilation:
    """One launch; lengths of one or two sources."""
    kind, config = TRITON_TYPES[dtype], default_config(dim, dtype, sum(lengths))
    constants = _constants(dim, config, list(lengths), aligned=True)
    arguments = _attention_kernel.arg_names
    types = {argument: f"*{kind}" for argument in arguments if argument.endswith("_ptr")}
    types |= {"scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    return Compilation(
        name=f"attention {kind} D={dim} {name}",
        kernel=_attention_kernel,
        signature={argument: types.get(argument, "i32") for argument in arguments},
        constants=constants,
        config=config,
        tensor_cores=kind != "fp32",
    )


def compilations() -> list[Compilation]:
    """Every default at the head dimensions of SD-1.5, with and without what the flags leave out."""
    return [
        _compilation(dtype, dim, name, *lengths)
        for dtype in TRITON_TYPES
        for dim in DIMS
        for name, lengths in (
            ("self", (4096,)),
            ("text", (77,)),
            # an odd second source asks for most registers
            ("joined", (4096, 4095)),
        )
    ]
