"""Text attention whose scores of a few tokens get a bias per position, told by the other branch.

Two short passes make the bias: the mean scores of the queries, and their standard form over the
positions of a map. The kernel of `attention` adds it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import contracts, flops
from dualdiff_engine.ops.reference import FLAT
from dualdiff_engine.ops.triton import listing
from dualdiff_engine.ops.triton.attention import (
    DIMS,
    attention_config,
    candidates,
    compilation,
    launch,
)
from dualdiff_engine.ops.triton.attention import default_config as plain_config
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation
from dualdiff_engine.ops.triton.tuning import Config

SCORES = Config({"BLOCK_M": 32, "BLOCK_K": 64}, num_warps=4, num_stages=2)
BIAS = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


def default_config(dim: int, dtype: torch.dtype, keys: int) -> Config:
    """What compiles without spills for every architecture."""
    if dtype == torch.float32 and 40 < dim <= 80:
        # with a bias, the default of attention spills
        return attention_config(64, 16, num_warps=8, num_stages=3)
    return plain_config(dim, dtype, keys)


@triton.jit(do_not_specialize=["positions"])
def _scores_kernel(
    query_ptr,  # [N, positions, C]
    mean_key_ptr,  # [N, C]
    scores_ptr,  # [N, positions] fp32
    positions,
    scale,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """scale · query · mean key of BLOCK_M positions; grid (blocks, N)."""
    row = tl.program_id(1).to(tl.int64)
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offsets_m < positions
    query_ptr += (row * positions + offsets_m)[:, None] * CHANNELS
    mean_key_ptr += row * CHANNELS
    sums = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        mask = mask_m[:, None] & (columns < CHANNELS)[None, :]
        query = tl.load(query_ptr + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        mean_key = tl.load(mean_key_ptr + columns, mask=columns < CHANNELS, other=0.0)
        sums += tl.sum(query * mean_key.to(tl.float32)[None, :], 1)
    tl.store(scores_ptr + row * positions + offsets_m, sums * scale, mask=mask_m)


@triton.jit(do_not_specialize=["maps", "pairs", "graphic_pairs", "positions"])
def _bias_kernel(
    scores_ptr,  # [2, maps, positions] fp32
    scale_ptr,  # [1]
    graphic_ptr,  # [graphic_pairs, positions], or None
    bias_ptr,  # [2, maps, positions] fp32
    maps,
    pairs,
    graphic_pairs,
    positions,
    strength,
    factor,
    flat,
    BLOCK: tl.constexpr,
):
    """A map's bias, times a factor, from the other branch's scores; grid (2 · maps,)."""
    own = tl.program_id(0)
    scores_ptr += ((own + maps) % (2 * maps)).to(tl.int64) * positions
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, positions, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        sums += tl.load(scores_ptr + offsets, mask=offsets < positions, other=0.0)
    mean = tl.sum(sums, 0) / positions
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, positions, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        scores = tl.load(scores_ptr + offsets, mask=offsets < positions, other=0.0)
        centred = tl.where(offsets < positions, scores - mean, 0.0)
        squares += centred * centred
    deviation = tl.sqrt(tl.sum(squares, 0) / positions)
    flattened = deviation < flat * (1 + tl.abs(mean))
    weight = tl.load(scale_ptr).to(tl.float32) * factor
    weight = tl.where(flattened, 0.0, weight / tl.where(flattened, 1.0, deviation))
    bias_ptr += own.to(tl.int64) * positions
    if graphic_ptr is not None:
        graphic_ptr += (own % pairs % graphic_pairs).to(tl.int64) * positions
    for start in range(0, positions, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < positions
        bias = (tl.load(scores_ptr + offsets, mask=mask, other=0.0) - mean) * weight
        if graphic_ptr is not None:
            graphic = tl.load(graphic_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            bias += strength * factor * (2 * graphic - 1)
        tl.store(bias_ptr + offsets, bias, mask=mask)


@torch.library.custom_op("dualdiff::align", mutates_args=())
def align(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    mean_key: Tensor,
    tokens: Tensor,
    scale: Tensor,
    graphic: Tensor | None = None,
    strength: float = 0.0,
) -> Tensor:
    """As `reference.align`: attention to the prompt, with a bias on the scores of some tokens.

    query [2, R, B, S, C], key and value [2·R, L, C], mean_key [2·R, C], tokens [L], scale [1],
    graphic [B, S] or [S] or none, of one dtype -> [2, R, B, S, C]. Rows of keys and values have any
    strides. Mean scores, bias, softmax and sums in fp32. Raises ValueError on other inputs.
    """
    contracts.align(query, key, value, num_heads, mean_key, tokens, scale, graphic)
    _, rows, pairs, positions, channels = query.shape
    merged = query.contiguous().view(2 * rows, pairs * positions, channels)
    scores, bias = query.new_empty(2, 2 * rows, pairs * positions, dtype=torch.float32)
    blocks = triton.cdiv(merged.shape[1], SCORES.blocks["BLOCK_M"])
    _scores_kernel[blocks, 2 * rows](
        merged, mean_key.contiguous(), scores, merged.shape[1], (channels * num_heads) ** -0.5,
        CHANNELS=channels, **SCORES.arguments,
    )  # fmt: skip
    graphic = None if graphic is None else graphic.contiguous().view(-1, positions)
    _bias_kernel[(2 * rows * pairs,)](
        scores, scale, graphic, bias, rows * pairs, pairs,
        1 if graphic is None else graphic.shape[0], positions, strength,
        # scores are multiplied by 1 / sqrt(D) once the bias has joined them
        math.sqrt(channels // num_heads), FLAT, **BIAS.arguments,
    )  # fmt: skip
    default = default_config(channels // num_heads, query.dtype, key.shape[1])
    drawn = bias, tokens.contiguous()
    out = launch("align", default, merged, [(key, value)], num_heads, drawn)
    return out.view(query.shape)


@align.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("align", "align")


def _passes(dtype: torch.dtype, channels: int) -> list[Compilation]:
    """Of the bias, with a graphic."""
    floats = {"scores_ptr": "*fp32", "bias_ptr": "*fp32"}
    given: list[tuple[str, Any, Config, dict[str, Any]]] = [
        ("scores", _scores_kernel, SCORES, {"CHANNELS": channels}),
        ("bias", _bias_kernel, BIAS, {}),
    ]
    return [
        listing.compilation(
            "align", f"C={channels} {name}", kernel, dtype, config, constants,
            types=floats, tensor_cores=False,
        )
        for name, kernel, config, constants in given
    ]  # fmt: skip


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at the head dimensions of SD-1.5, and the passes before it.

    With every_candidate, what tuning may choose as well.
    """
    listed = [x for dtype in TRITON_TYPES for x in _passes(dtype, 320)]
    for dtype in TRITON_TYPES:
        for dim in DIMS:
            shape = (dim, dtype, 77)
            choices = listing.configs(default_config(*shape), candidates(*shape), every_candidate)
            listed += [compilation("align", dim, dtype, "text", x, biased=True) for x in choices]
    return listed
