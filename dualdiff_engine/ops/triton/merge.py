"""The merge of the branches in one launch: both products are of one normalised difference.

As in `exchange`, a program owns some positions of both branches, and normalised values are computed
again for every tile of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import contracts, flops
from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.exchange import (
    _add_and_store,
    _moments,
    _normed,
    _weight_tile,
    candidates,
    default_config,
    shape_class,
)
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation


@triton.jit(do_not_specialize=["positions"])
def _merge_kernel(
    input_ptr,  # [2, positions, C]
    weight_ptr,  # [2, C, C]
    residual_ptr,  # [2, positions, C]
    positions,
    out_ptr,  # [2, positions, C]
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M positions of both branches; grid (blocks,)."""
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offsets_m < positions)[:, None]
    rows = offsets_m.to(tl.int64)[:, None] * CHANNELS
    branch = positions.to(tl.int64) * CHANNELS
    row_0, row_1 = input_ptr + rows, input_ptr + branch + rows
    moments_0 = _moments(row_0, mask_m, eps, CHANNELS, BLOCK_K)
    moments_1 = _moments(row_1, mask_m, eps, CHANNELS, BLOCK_K)
    dtype = input_ptr.dtype.element_ty
    weight_1_ptr = weight_ptr + CHANNELS * CHANNELS

    for first_n in range(0, CHANNELS, BLOCK_N):
        moved_0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        moved_1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_k in range(0, CHANNELS, BLOCK_K):
            columns = first_k + tl.arange(0, BLOCK_K)[None, :]
            mask = mask_m & (columns < CHANNELS)
            normed_1 = _normed(row_1, columns, mask, moments_1)
            difference = (normed_1 - _normed(row_0, columns, mask, moments_0)).to(dtype)
            tile = _weight_tile(weight_ptr, first_n, first_k, CHANNELS, BLOCK_N, BLOCK_K)
            moved_0 = tl.dot(difference, tile, moved_0, input_precision="ieee")
            tile = _weight_tile(weight_1_ptr, first_n, first_k, CHANNELS, BLOCK_N, BLOCK_K)
            moved_1 = tl.dot(difference, tile, moved_1, input_precision="ieee")
        offsets_n = first_n + tl.arange(0, BLOCK_N)[None, :]
        mask = mask_m & (offsets_n < CHANNELS)
        offsets = rows + offsets_n
        _add_and_store(input_ptr, residual_ptr, out_ptr, offsets, mask, moved_0)
        # towards what the other branch lacks
        _add_and_store(input_ptr, residual_ptr, out_ptr, branch + offsets, mask, -moved_1)


@torch.library.custom_op("dualdiff::merge", mutates_args=())
def merge(input: Tensor, weight: Tensor, residual: Tensor, eps: float = INTERACTION_EPS) -> Tensor:
    """As `reference.merge`: residual_f + x_f + G_f (x̂_g - x̂_f), g the other branch.

    input and residual [2, M, C], weight [2, C, C], of one dtype -> [2, M, C]. Statistics and sums
    in fp32; the operands of products in the input's dtype. Raises ValueError on other shapes.
    """
    contracts.merge(input, weight, residual)
    _, positions, channels = input.shape
    out = input.new_empty(input.shape)
    config = tuning.choose(
        "merge", shape_class(channels, input.dtype), default_config(input.dtype), input.device
    )
    grid = (triton.cdiv(positions, config.blocks["BLOCK_M"]),)
    _merge_kernel[grid](
        input.contiguous(), weight.contiguous(), residual.contiguous(), positions, out, eps,
        CHANNELS=channels, **config.arguments,
    )  # fmt: skip
    return out


@merge.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


flops.register("merge", "merge")


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at SD-1.5 shapes; with every_candidate what tuning may choose as well."""
    return [
        listing.compilation(
            "merge", f"C={channels}", _merge_kernel, dtype, config, {"CHANNELS": channels}
        )
        for dtype in TRITON_TYPES
        for channels in (320, 640, 1280)
        for config in listing.configs(default_config(dtype), candidates(dtype), every_candidate)
    ]
