"""The gated half of a feed-forward in one pass: the wide product is never in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.branch_linear import (
    BUSY,
    add_products,
    as_rows,
    product_config,
    require,
    shape_class,
    tile_of_program,
)
from dualdiff_engine.ops.triton.listing import HALVES, Compilation
from dualdiff_engine.ops.triton.tuning import Config


@triton.jit(do_not_specialize=["rows"])
def _geglu_kernel(
    input_ptr,  # [rows, C], rows STRIDE_INPUT apart
    weight_ptr,  # [2·I, C], values before gates
    bias_ptr,  # [2·I]
    out_ptr,  # [rows, I]
    rows,
    STRIDE_INPUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of the output; C = CHANNELS, I = COLUMNS; grid (tiles,).

    The product has a column of values and one of gates for each column of the output, side by side:
    both are then held by the same thread, and one product of twice the width feeds the tensor cores
    better than two.
    """
    tile_m, tile_n = tile_of_program(rows, COLUMNS, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    within_m, within_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # over the edge the last row is read again: what comes of it is not stored
    pairs = tl.arange(0, 2 * BLOCK_N)
    pairs = tl.minimum(pairs // 2, COLUMNS - 1 - first_n) + pairs % 2 * COLUMNS
    accumulator = tl.zeros([BLOCK_M, 2 * BLOCK_N], tl.float32)
    accumulator += tl.load(bias_ptr + first_n + pairs).to(tl.float32)[None, :]
    accumulator = add_products(
        accumulator,
        input_ptr + first_m.to(tl.int64) * STRIDE_INPUT,
        weight_ptr + first_n.to(tl.int64) * CHANNELS,
        tl.minimum(within_m, rows - 1 - first_m),
        pairs,
        STRIDE_INPUT, CHANNELS, BLOCK_K,
    )  # fmt: skip
    value, gate = tl.split(tl.reshape(accumulator, [BLOCK_M, BLOCK_N, 2]))
    # 0.7071... = sqrt(1/2)
    out = value * (0.5 * gate * (1.0 + tl.math.erf(gate * 0.7071067811865476)))
    out_ptr += first_m.to(tl.int64) * COLUMNS + first_n
    mask = (within_m < rows - first_m)[:, None] & (within_n < COLUMNS - first_n)[None, :]
    out_tile = out_ptr + within_m[:, None] * COLUMNS + within_n[None, :]
    tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)


def default_config(rows: int, columns: int, dtype: torch.dtype) -> Config:
    """What compiles without spills for every architecture; columns of the output."""
    if dtype == torch.float32:
        return product_config(64, 64, 16, num_warps=8, num_stages=3)
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 64) < BUSY:
        return product_config(64, 64, 64, num_warps=4, num_stages=3)
    return product_config(128, 64, 64, num_warps=8, num_stages=3)


def candidates(rows: int, columns: int, dtype: torch.dtype) -> list[Config]:
    """What is worth measuring, at most 8; the largest do not fit every architecture."""
    if dtype == torch.float32:
        return [
            product_config(64, 64, 16, 8, 3),
            product_config(64, 32, 16, 8, 3),
            product_config(64, 32, 32, 8, 2),
        ]
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 64) < BUSY:
        return [
            product_config(128, 64, 64, 8, 3),
            product_config(128, 32, 64, 4, 4),
            product_config(64, 64, 64, 4, 3),
            product_config(64, 64, 64, 4, 4),
            product_config(64, 32, 64, 4, 4),
        ]
    return [
        product_config(128, 128, 64, 8, 3),
        product_config(256, 64, 64, 8, 3),
        product_config(128, 64, 64, 8, 3),
        product_config(128, 64, 64, 8, 4),
        product_config(128, 64, 32, 8, 4),
        product_config(128, 32, 64, 4, 4),
    ]


@torch.library.custom_op("dualdiff::geglu", mutates_args=())
def geglu(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """value · gelu(gate), (value, gate) = halves of x Wᵀ + b, with the erf GELU; rounded once.

    input [..., C], weight [2·I, C] contiguous, bias [2·I], of one dtype -> [..., I] contiguous.
    Rows of input may be strided; what no single row stride describes is copied. Sums, gate and
    GELU in fp32. Raises ValueError on other shapes.
    """
    columns, channels = weight.shape[0] // 2, input.shape[-1]
    require(
        weight.shape == (2 * columns, channels)
        and weight.is_contiguous()
        and bias.shape == (2 * columns,),
        "geglu takes input [..., C], contiguous weight [2·I, C], bias [2·I]",
        input, weight, bias,
    )  # fmt: skip
    out = input.new_empty(*input.shape[:-1], columns)
    x = as_rows(input)
    rows, dtype = x.shape[0], input.dtype
    config = tuning.choose(
        "geglu",
        shape_class(rows, columns, channels, dtype),
        default_config(rows, columns, dtype),
        input.device,
    )
    blocks = config.blocks
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_N"])
    _geglu_kernel[tiles,](
        x, weight, bias, out, rows, x.stride(0), columns, channels, **config.arguments
    )
    return out


@geglu.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0] // 2)


flops.register("geglu", "geglu")


# (rows, channels): batch 32 at resolution 512, and the background pass of one picture
LAUNCHES = ((524288, 320), (131072, 640), (32768, 1280), (128, 1280))


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at SD-1.5 shapes; with every_candidate what tuning may choose as well."""
    halves = [(dtype, *shape) for dtype in HALVES for shape in LAUNCHES]
    listed = []
    for dtype, rows, channels in (*halves, (torch.float32, 8192, 1280)):
        shape = (rows, 4 * channels, dtype)
        constants = {"STRIDE_INPUT": channels, "COLUMNS": 4 * channels, "CHANNELS": channels}
        listed += [
            listing.compilation(
                "geglu", f"M={rows} C={channels}", _geglu_kernel, dtype, config, constants
            )
            for config in listing.configs(
                default_config(*shape), candidates(*shape), every_candidate
            )
        ]
    return listed
