"""Matrix products, one weight per branch, in one launch; what is added rides on the way out.

The pieces that other kernels with a product are made of are here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.triton import tuning
from dualdiff_engine.ops.triton.tuning import TRITON_TYPES, Compilation, Config

# row tiles that walk all column tiles together: what they read stays in the L2 cache
GROUP = 8
# tiles that give every multiprocessor of a large GPU something to do
BUSY = 128


@triton.jit
def tile_of_program(
    rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr
):
    """(row tile, column tile) of this program; groups of row tiles one after the other."""
    program = tl.program_id(0)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = program % (GROUP * tiles_n)
    return first + within % height, within // height


@triton.jit
def add_products(
    sums,
    left_ptr,
    right_ptr,
    left_rows,
    right_rows,
    STRIDE_LEFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """sums [BLOCK_M, BLOCK_N] and the products of every left with every right row over CHANNELS.

    left_rows [BLOCK_M] and right_rows [BLOCK_N] name rows that exist, counted from the pointers;
    right rows are contiguous.
    """
    offsets_k = tl.arange(0, BLOCK_K)
    # 32-bit offsets from a tile's first row: half the registers of pointers
    left = left_rows[:, None] * STRIDE_LEFT + offsets_k[None, :]
    right = right_rows[None, :] * CHANNELS + offsets_k[:, None]
    for start in range(0, CHANNELS, BLOCK_K):
        if CHANNELS % BLOCK_K == 0:
            x, w = tl.load(left_ptr + left), tl.load(right_ptr + right)
        else:
            mask = start + offsets_k < CHANNELS
            x = tl.load(left_ptr + left, mask=mask[None, :], other=0.0)
            w = tl.load(right_ptr + right, mask=mask[:, None], other=0.0)
        sums = tl.dot(x, w, sums, input_precision="ieee")
        left += BLOCK_K
        right += BLOCK_K
    return sums


@triton.jit(do_not_specialize=["rows", "positions", "shared_rows"])
def _branch_linear_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    share_ptr,
    keep_ptr,
    out_ptr,
    rows,
    positions,
    shared_rows,
    STRIDE_INPUT: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of out [F, rows, COLUMNS]; grid (tiles, F).

    share [R, positions, SHARED] joins the last SHARED columns of branch 0, where shared_rows
    consecutive rows, B times all positions, have one share.
    """
    branch = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = tile_of_program(rows, COLUMNS, BLOCK_M, BLOCK_N, GROUP)
    first_m, first_n = tile_m * BLOCK_M, tile_n * BLOCK_N
    within_m, within_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    # over the edge the last row is read again: what comes of it is not stored
    left_rows = tl.minimum(within_m, rows - 1 - first_m)
    right_rows = tl.minimum(within_n, COLUMNS - 1 - first_n)
    out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # the bias comes first: at the end it would take registers from residual and share
    if bias_ptr is not None:
        out += tl.load(bias_ptr + first_n + right_rows).to(tl.float32)[None, :]
    out = add_products(
        out,
        input_ptr + (branch * rows + first_m) * STRIDE_INPUT,
        weight_ptr + (branch * COLUMNS + first_n) * CHANNELS,
        left_rows, right_rows, STRIDE_INPUT, CHANNELS, BLOCK_K,
    )  # fmt: skip
    offsets_m, offsets_n = first_m + within_m, first_n + within_n
    mask = (offsets_m < rows)[:, None] & (offsets_n < COLUMNS)[None, :]
    corner = (branch * rows + first_m) * COLUMNS + first_n
    tile = within_m[:, None] * COLUMNS + within_n[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + corner + tile, mask=mask).to(tl.float32)
    if share_ptr is not None:
        joined = mask & (branch == 0) & (offsets_n >= COLUMNS - SHARED)[None, :]
        share_rows = offsets_m // shared_rows * positions + offsets_m % positions
        share = share_ptr + share_rows.to(tl.int64)[:, None] * SHARED
        share += offsets_n - (COLUMNS - SHARED)
        share = tl.load(share, mask=joined).to(tl.float32)
        out = tl.where(joined, tl.load(keep_ptr).to(tl.float32) * out + share, out)
    tl.store(out_ptr + corner + tile, out.to(out_ptr.dtype.element_ty), mask=mask)


def shape_class(rows: int, columns: int, channels: int, dtype: torch.dtype) -> str:
    """The row of a tuning table; rows, of all branches, are rounded up to a power of two."""
    kind = str(dtype).removeprefix("torch.")
    return tuning.key(M=triton.next_power_of_2(rows), D=columns, C=channels, dtype=kind)


def product_config(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth, "GROUP": GROUP}
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


def _launch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    share: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """input [F, ..., C], or [..., C] where F = 1, and weight [F, D, C] -> [..., D]."""
    branches, columns, channels = weight.shape
    out = input.new_empty(*input.shape[:-1], columns)
    left = as_rows(input)
    residual = None if residual is None else residual.contiguous()
    share = None if share is None else share.contiguous()
    groups, positions, shared = (1, 1, 0) if share is None else share.shape
    rows, dtype = left.shape[0], input.dtype
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
        left, weight, bias, residual, share, keep, out, rows, positions, rows // groups,
        STRIDE_INPUT=left.stride(0),
        COLUMNS=columns,
        CHANNELS=channels,
        SHARED=shared,
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
    share: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """y_f = x_f W_fᵀ + b; the last E columns of branch 0 become keep · y_0 + share; rounded once.

    input [F, ..., C] of F·M rows, weight [F, D, C] contiguous, bias [D], share [R, S, E] of the
    rows M = R·B·S of a branch, keep [1] -> [F, ..., D] contiguous. Rows of input may be strided,
    as in `linear`. Sums in fp32. Raises ValueError on other shapes.
    """
    columns = weight.shape[-2]
    rows = input.shape[1:-1].numel()
    fits = share is None and keep is None
    if share is not None and keep is not None:
        fits = (
            share.dim() == 3
            and rows % share.shape[:2].numel() == 0
            and share.shape[2] <= columns
            and keep.shape == (1,)
        )
    require(
        fits
        and weight.shape == (input.shape[0], columns, input.shape[-1])
        and weight.is_contiguous()
        and (bias is None or bias.shape == (columns,)),
        "branch_linear takes input [F, M, C], contiguous weight [F, D, C], bias [D], "
        "and of M = R·B·S rows share [R, S, E <= D] with keep [1]",
        input, weight, bias, share, keep,
    )  # fmt: skip
    return _launch(input, weight, bias, None, share, keep)


@linear.register_fake
@branch_linear.register_fake
def _(input: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[-2])


flops.register("linear", "linear")
flops.register("branch_linear", "branch_linear")


def _compilation(
    dtype: torch.dtype, rows: int, columns: int, channels: int, *parts: str, shared: int = 0
) -> Compilation:
    """One launch at `rows` of all branches; parts: which of the optional tensors it has."""
    given = {f"{part}_ptr" for part in ("input", "weight", "out", *parts)}
    arguments = _branch_linear_kernel.arg_names
    kind, config = TRITON_TYPES[dtype], default_config(rows, columns, dtype)
    absent = {name: None for name in arguments if name.endswith("_ptr") and name not in given}
    constants = {
        **absent,
        **config.blocks,
        "STRIDE_INPUT": channels,
        "COLUMNS": columns,
        "CHANNELS": channels,
        "SHARED": shared,
    }
    signature = {
        name: "constexpr" if name in constants else f"*{kind}" if name in given else "i32"
        for name in arguments
    }
    return Compilation(
        name=f"branch_linear {kind} M={rows} C={channels} D={columns} {'+'.join(parts)}".rstrip(),
        kernel=_branch_linear_kernel,
        signature=signature,
        constants=constants,
        config=config,
        tensor_cores=kind != "fp32",
    )


def compilations() -> list[Compilation]:
    """Every default at SD-1.5 shapes: batch 32, and what few rows take at batch 1."""
    listed = []
    for dtype in (torch.float16, torch.bfloat16):
        for rows, width in ((524288, 320), (131072, 640), (32768, 1280)):
            listed += [
                _compilation(dtype, rows, 3 * width, width),
                _compilation(dtype, rows, 3 * width, width, "share", "keep", shared=2 * width),
                _compilation(dtype, rows, width, width),
                _compilation(dtype, rows, width, width, "bias"),
                _compilation(dtype, rows, width, width, "bias", "residual"),
                _compilation(dtype, rows, width, 4 * width, "bias", "residual"),
            ]
        listed += [
            _compilation(dtype, 256, 1280, 5120, "bias", "residual"),
            _compilation(dtype, 1024, 1280, 1280, "bias"),
            # keys and values of two prompts of 77 tokens in two branches
            _compilation(dtype, 308, 640, 768),
            _compilation(dtype, 308, 2560, 768),
        ]
    single = torch.float32
    listed.append(_compilation(single, 32768, 3840, 1280, "share", "keep", shared=2560))
    listed.append(_compilation(single, 32768, 1280, 5120, "bias", "residual"))
    return listed
