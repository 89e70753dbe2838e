"""Matrix products, one weight per branch, in one launch; whatever is added joins before the store.

The parts that other kernels with a product use are here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.listing import HALVES, Compilation
from dualdiff_engine.ops.triton.tuning import Config

# row tiles that walk all column tiles together: what they read stays in the L2 cache
GROUP_M = 8
# tiles that give every multiprocessor of a large GPU something to do
BUSY = 128


@triton.jit
def tile_of_program(
    rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr
):
    """(row tile, column tile) of this program; groups of row tiles one after the other."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    first_m = program // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def add_products(
    accumulator,  # [BLOCK_M, BLOCK_N] fp32
    input_ptr,  # [.., C], row STRIDE_INPUT apart
    weight_ptr,  # [.., C]
    input_rows,
    weight_rows,
    STRIDE_INPUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """accumulator + the products of every input row with every weight row over CHANNELS.

    input_rows [BLOCK_M] and weight_rows [BLOCK_N] name rows that exist, counted from the pointers.
    """
    offsets_k = tl.arange(0, BLOCK_K)
    # 32-bit offsets from a tile's first row: half the registers of pointers
    offsets_x = input_rows[:, None] * STRIDE_INPUT + offsets_k[None, :]
    offsets_w = weight_rows[None, :] * CHANNELS + offsets_k[:, None]
    for start in range(0, CHANNELS, BLOCK_K):
        if CHANNELS % BLOCK_K == 0:
            x, w = tl.load(input_ptr + offsets_x), tl.load(weight_ptr + offsets_w)
        else:
            mask = start + offsets_k < CHANNELS
            x = tl.load(input_ptr + offsets_x, mask=mask[None, :], other=0.0)
            w = tl.load(weight_ptr + offsets_w, mask=mask[:, None], other=0.0)
        accumulator = tl.dot(x, w, accumulator, input_precision="ieee")
        offsets_x += BLOCK_K
        offsets_w += BLOCK_K
    return accumulator


@triton.jit(do_not_specialize=["rows", "positions", "rows_per_background"])
def _branch_linear_kernel(
    input_ptr,  # [F, rows, C], rows STRIDE_INPUT apart
    weight_ptr,  # [F, D, C]
    bias_ptr,  # [D] or None
    residual_ptr,  # [F, rows, D] or None
    background_kv_ptr,  # [R, positions, E] or None
    keep_ptr,  # [1] or None
    out_ptr,  # [F, rows, D]
    rows,
    positions,
    rows_per_background,
    STRIDE_INPUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    KV_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of a branch's output; C = CHANNELS, D = COLUMNS, E = KV_COLUMNS; grid (tiles, F).

    background_kv joins the last E columns of branch 0, where rows_per_background consecutive
    rows, B times all positions, have the same one.
    """
    branch = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = tile_of_program(rows, COLUMNS, BLOCK_M, BLOCK_N, GROUP_M)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    within_m, within_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # over the edge the last row is read again: what comes of it is not stored
    input_rows = tl.minimum(within_m, rows - 1 - first_m)
    weight_rows = tl.minimum(within_n, COLUMNS - 1 - first_n)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # the bias comes first: at the end it would take registers from residual and background
    if bias_ptr is not None:
        accumulator += tl.load(bias_ptr + first_n + weight_rows).to(tl.float32)[None, :]
    accumulator = add_products(
        accumulator,
        input_ptr + (branch * rows + first_m) * STRIDE_INPUT,
        weight_ptr + (branch * COLUMNS + first_n) * CHANNELS,
        input_rows, weight_rows, STRIDE_INPUT, CHANNELS, BLOCK_K,
    )  # fmt: skip
    offsets_m, offsets_n = first_m + within_m, first_n + within_n
    mask = (offsets_m < rows)[:, None] & (offsets_n < COLUMNS)[None, :]
    corner = (branch * rows + first_m) * COLUMNS + first_n
    tile = within_m[:, None] * COLUMNS + within_n[None, :]
    if residual_ptr is not None:
        accumulator += tl.load(residual_ptr + corner + tile, mask=mask).to(tl.float32)
    if background_kv_ptr is not None:
        joined = mask & (branch == 0) & (offsets_n >= COLUMNS - KV_COLUMNS)[None, :]
        kv_rows = offsets_m // rows_per_background * positions + offsets_m % positions
        kv_tile = background_kv_ptr + kv_rows.to(tl.int64)[:, None] * KV_COLUMNS
        kv_tile += offsets_n - (COLUMNS - KV_COLUMNS)
        background_kv = tl.load(kv_tile, mask=joined).to(tl.float32)
        keep = tl.load(keep_ptr).to(tl.float32)
        accumulator = tl.where(joined, keep * accumulator + background_kv, accumulator)
    tl.store(out_ptr + corner + tile, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


def shape_class(rows: int, columns: int, channels: int, dtype: torch.dtype) -> str:
    """The row of a tuning table; rows, of all branches, are rounded up to a power of two."""
    return tuning.key(M=triton.next_power_of_2(rows), D=columns, C=channels, dtype=dtype)


def product_config(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "GROUP_M": GROUP_M}
    return Config(blocks, num_warps, num_stages)


def default_config(rows: int, columns: int, dtype: torch.dtype) -> Config:
    """What compiles without spills for every architecture; rows of all branches."""
    if dtype == torch.float32:
        return product_config(64, 64, 16, num_warps=4, num_stages=3)
    if triton.cdiv(rows, 64) * triton.cdiv(columns, 64) < BUSY:
        return product_config(64, 32, 64, num_warps=4, num_stages=4)
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) < BUSY:
        return product_config(64, 64, 64, num_warps=8, num_stages=4)
    # 320 columns fill five tiles of 64, not three of 128
    if columns < 512 and columns % 128:
        return product_config(128, 64, 64, num_warps=4, num_stages=3)
    # depth 64 spills on sm_80 where a residual is added
    return product_config(128, 128, 32, num_warps=8, num_stages=4)


def candidates(rows: int, columns: int, dtype: torch.dtype) -> list[Config]:
    """What is worth measuring, at most 8; the largest do not fit every architecture."""
    if dtype == torch.float32:
        return [
            product_config(64, 64, 16, 4, 3),
            product_config(64, 64, 32, 8, 2),
            product_config(128, 64, 16, 8, 3),
        ]
    if triton.cdiv(rows, 128) * triton.cdiv(columns, 128) < BUSY:
        return [
            product_config(128, 64, 64, 4, 3),
            product_config(64, 128, 64, 8, 3),
            product_config(64, 64, 64, 4, 4),
            product_config(64, 64, 64, 8, 4),
            product_config(64, 64, 128, 4, 3),
            product_config(64, 32, 64, 4, 4),
            product_config(64, 32, 128, 4, 3),
        ]
    return [
        product_config(128, 256, 64, 8, 3),
        product_config(256, 128, 64, 8, 3),
        product_config(128, 128, 64, 8, 3),
        product_config(128, 128, 64, 8, 4),
        product_config(128, 128, 32, 8, 4),
        product_config(256, 64, 64, 8, 3),
        product_config(128, 64, 64, 4, 3),
        product_config(64, 128, 64, 4, 3),
    ]


def require(fits: bool, expected: str, *tensors: Tensor | None) -> None:
    """ValueError with the expected and the received shapes unless they fit."""
    if not fits:
        got = ", ".join("None" if x is None else str(list(x.shape)) for x in tensors)
        raise ValueError(f"{expected}; got {got}")


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] -> [rows, C] with contiguous columns: a view where one row stride describes it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _constants(columns: int, channels: int, stride: int, kv_columns: int) -> dict[str, int]:
    """The kernel's compile-time arguments, without blocks."""
    return {
        "STRIDE_INPUT": stride,
        "COLUMNS": columns,
        "CHANNELS": channels,
        "KV_COLUMNS": kv_columns,
    }


def _launch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    background_kv: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """input [F, ..., C], or [..., C] where F = 1, and weight [F, D, C] -> [..., D]."""
    branches, columns, channels = weight.shape
    out = input.new_empty(*input.shape[:-1], columns)
    x = as_rows(input)
    residual = None if residual is None else residual.contiguous()
    background_kv = None if background_kv is None else background_kv.contiguous()
    guided, positions, kv_columns = (1, 1, 0) if background_kv is None else background_kv.shape
    rows, dtype = x.shape[0], input.dtype
    config = tuning.choose(
        "branch_linear",
        shape_class(rows, columns, channels, dtype),
        default_config(rows, columns, dtype),
        input.device,
    )
    rows //= branches
    blocks = config.blocks
    tiles = triton.cdiv(rows, blocks["BLOCK_M"]) * triton.cdiv(columns, blocks["BLOCK_N"])
    _branch_linear_kernel[tiles, branches](
        x, weight, bias, residual, background_kv, keep, out, rows, positions, rows // guided,
        **_constants(columns, channels, x.stride(0), kv_columns),
        **config.arguments,
    )  # fmt: skip
    return out


@torch.library.custom_op("dualdiff::linear", mutates_args=())
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """y = x Wᵀ + b + residual, rounded once.

    input [..., C], weight [D, C] contiguous, bias [D], residual [..., D], of one dtype -> [..., D]
    contiguous. Rows of input may be strided; what no single row stride describes is copied, as is
    a residual that is not contiguous. Sums in fp32. Raises ValueError on other shapes.
    """
    columns = weight.shape[0]
    require(
        weight.shape == (columns, input.shape[-1])
        and weight.is_contiguous()
        and (bias is None or bias.shape == (columns,))
        and (residual is None or residual.shape == (*input.shape[:-1], columns)),
        "linear takes input [..., C], contiguous weight [D, C], bias [D], residual [..., D]",
        input, weight, bias, residual,
    )  # fmt: skip
    return _launch(input, weight[None], bias, residual)


@torch.library.custom_op("dualdiff::branch_linear", mutates_args=())
def branch_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    background_kv: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """y_f = x_f W_fᵀ + b, whose last E columns become keep · y_0 + background_kv in branch 0.

    input [F, ..., C] of F·M rows, weight [F, D, C] contiguous, bias [D], background_kv [R, S, E]
    for the rows M = R·B·S of a branch, keep [1] -> [F, ..., D] contiguous. Rows of input may be
    strided, as in `linear`. Sums in fp32, rounded once. Raises ValueError on other shapes.
    """
    columns = weight.shape[-2]
    rows = input.shape[1:-1].numel()
    fits = background_kv is None and keep is None
    if background_kv is not None and keep is not None:
        fits = (
            background_kv.dim() == 3
            and rows % background_kv.shape[:2].numel() == 0
            and background_kv.shape[2] <= columns
            and keep.shape == (1,)
        )
    require(
        fits
        and weight.shape == (input.shape[0], columns, input.shape[-1])
        and weight.is_contiguous()
        and (bias is None or bias.shape == (columns,)),
        "branch_linear takes input [F, M, C], contiguous weight [F, D, C], bias [D], "
        "and of M = R·B·S rows background_kv [R, S, E <= D] with keep [1]",
        input, weight, bias, background_kv, keep,
    )  # fmt: skip
    return _launch(input, weight, bias, None, background_kv, keep)


@linear.register_fake
@branch_linear.register_fake
def _(input: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[-2])


flops.register("linear", "linear")
flops.register("branch_linear", "branch_linear")


# what a launch may lack
OPTIONAL = ("bias", "residual", "background_kv", "keep")
# rows of both branches at batch 32 and resolution 512, channels
BATCH = ((524288, 320), (131072, 640), (32768, 1280))


def _launches(dtype: torch.dtype) -> list[tuple[int, int, int, tuple[str, ...]]]:
    """(rows of all branches, columns, channels, optional tensors given) of SD-1.5's products."""
    if dtype == torch.float32:
        return [(32768, 3840, 1280, OPTIONAL[2:]), (32768, 1280, 5120, OPTIONAL[:2])]
    launches = []
    for rows, width in BATCH:
        launches += [
            (rows, 3 * width, width, ()),
            (rows, 3 * width, width, OPTIONAL[2:]),
            (rows, width, width, ()),
            (rows, width, width, OPTIONAL[:1]),
            (rows, width, width, OPTIONAL[:2]),
            (rows, width, 4 * width, OPTIONAL[:2]),
        ]
    # what few rows take at batch 1
    return [
        *launches,
        (256, 1280, 5120, OPTIONAL[:2]),
        (1024, 1280, 1280, OPTIONAL[:1]),
        # keys and values of two prompts of 77 tokens in two branches
        (308, 640, 768, ()),
        (308, 2560, 768, ()),
    ]


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at SD-1.5 shapes; with every_candidate what tuning may choose as well."""
    listed = []
    for dtype in (*HALVES, torch.float32):
        for rows, columns, channels, given in _launches(dtype):
            shape = (rows, columns, dtype)
            choices = listing.configs(default_config(*shape), candidates(*shape), every_candidate)
            # keys and values are two thirds of a packed projection
            kv_columns = 2 * columns // 3 if "background_kv" in given else 0
            constants = {
                **{f"{name}_ptr": None for name in OPTIONAL if name not in given},
                **_constants(columns, channels, channels, kv_columns),
            }
            listed += [
                listing.compilation(
                    "branch_linear", f"M={rows} C={channels} D={columns} {'+'.join(given)}",
                    _branch_linear_kernel, dtype, config, constants,
                )
                for config in choices
            ]  # fmt: skip
    return listed
