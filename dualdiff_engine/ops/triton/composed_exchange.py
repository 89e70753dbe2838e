"""The exchange between the branches as a composition: two kernels around the library's products.

The products are 99 % of the work, and the library's are the fastest there are. What lies between
them is bound by memory: one kernel takes both branches' rows to their difference and statistics,
another takes the first product to the gates, and writes the second product's operand and what the
product is added to.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import contracts, flops
from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton import listing
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation
from dualdiff_engine.ops.triton.tuning import Config


@triton.jit
def _moments(x, mask, eps, CHANNELS: tl.constexpr):
    """(mean, reciprocal deviation) of rows x [rows, width] in fp32, zero outside of the mask."""
    mean = tl.sum(x, 1) / CHANNELS
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)


@triton.jit
def _normed(x, mask, moments):
    mean, rstd = moments
    return tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)


# a count of 1 would become a constant, which has no `to`
@triton.jit(do_not_specialize=["positions"])
def _exchange_difference_kernel(
    input_ptr,  # [2, positions, C]
    gate_bias_ptr,  # [C]
    difference_ptr,  # [positions, C]
    statistics_ptr,  # [5, positions] fp32: mean and 1 / deviation of each branch, m·d
    positions,
    eps,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,  # a power of two, not below CHANNELS
    BLOCK_M: tl.constexpr,
):
    """d = x̂_0 - x̂_1 of BLOCK_M positions, whole rows at once; grid (blocks,)."""
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)[None, :]
    mask_m = offsets_m < positions
    mask = mask_m[:, None] & (columns < CHANNELS)
    offsets = offsets_m.to(tl.int64)[:, None] * CHANNELS + columns
    branch = positions.to(tl.int64) * CHANNELS
    x_0 = tl.load(input_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x_1 = tl.load(input_ptr + branch + offsets, mask=mask, other=0.0).to(tl.float32)
    moments_0 = _moments(x_0, mask, eps, CHANNELS)
    moments_1 = _moments(x_1, mask, eps, CHANNELS)
    difference = _normed(x_0, mask, moments_0) - _normed(x_1, mask, moments_1)
    tl.store(difference_ptr + offsets, difference.to(difference_ptr.dtype.element_ty), mask=mask)
    bias = tl.load(gate_bias_ptr + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)
    shared = tl.sum(difference * bias, 1)
    rows = statistics_ptr + offsets_m
    tl.store(rows, moments_0[0], mask=mask_m)
    tl.store(rows + positions, moments_0[1], mask=mask_m)
    tl.store(rows + 2 * positions, moments_1[0], mask=mask_m)
    tl.store(rows + 3 * positions, moments_1[1], mask=mask_m)
    tl.store(rows + 4 * positions, shared, mask=mask_m)


@triton.jit(do_not_specialize=["positions"])
def _exchange_mix_kernel(
    input_ptr,  # [2, positions, C]
    projected_ptr,  # [positions, C], M d
    statistics_ptr,  # [5, positions] fp32
    value_bias_ptr,  # [C]
    residual_ptr,  # [2, positions, C]
    mixed_ptr,  # [2, positions, C]
    out_ptr,  # [2, positions, C]
    positions,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """mixed_f = x̂_1 + gate_f d and out_f = residual_f + x_f + v of BLOCK_M positions."""
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, WIDTH)[None, :]
    mask_m = offsets_m < positions
    mask = mask_m[:, None] & (columns < CHANNELS)
    offsets = offsets_m.to(tl.int64)[:, None] * CHANNELS + columns
    branch = positions.to(tl.int64) * CHANNELS
    rows = statistics_ptr + offsets_m
    moments_0 = (
        tl.load(rows, mask=mask_m, other=0.0),
        tl.load(rows + positions, mask=mask_m, other=0.0),
    )
    moments_1 = (
        tl.load(rows + 2 * positions, mask=mask_m, other=0.0),
        tl.load(rows + 3 * positions, mask=mask_m, other=0.0),
    )
    shared = tl.load(rows + 4 * positions, mask=mask_m, other=0.0)
    x_0 = tl.load(input_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x_1 = tl.load(input_ptr + branch + offsets, mask=mask, other=0.0).to(tl.float32)
    projected = tl.load(projected_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    normed_0, normed_1 = _normed(x_0, mask, moments_0), _normed(x_1, mask, moments_1)
    difference = normed_0 - normed_1
    gate_0 = tl.sigmoid(tl.sum(normed_0 * projected, 1) + shared)[:, None]
    gate_1 = tl.sigmoid(tl.sum(normed_1 * projected, 1) + shared)[:, None]
    dtype = mixed_ptr.dtype.element_ty
    tl.store(mixed_ptr + offsets, (normed_1 + gate_0 * difference).to(dtype), mask=mask)
    tl.store(mixed_ptr + branch + offsets, (normed_1 + gate_1 * difference).to(dtype), mask=mask)
    bias = tl.load(value_bias_ptr + columns, mask=columns < CHANNELS, other=0.0).to(tl.float32)
    sum_0 = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + x_0 + bias
    tl.store(out_ptr + offsets, sum_0.to(dtype), mask=mask)
    residual_1 = tl.load(residual_ptr + branch + offsets, mask=mask, other=0.0)
    sum_1 = residual_1.to(tl.float32) + x_1 + bias
    tl.store(out_ptr + branch + offsets, sum_1.to(dtype), mask=mask)


def config(channels: int) -> Config:
    """Rows so many that a thread holds 16 values of each tensor; bound by memory, not tuned."""
    width = _width(channels)
    # a single row spreads over more threads: 16 values of it spill in float32
    warps = 4 if width < 2048 else 8
    return Config({"BLOCK_M": max(1, 2048 // width)}, num_warps=warps, num_stages=1)


def _width(channels: int) -> int:
    return int(triton.next_power_of_2(channels))


@torch.library.custom_op("dualdiff::composed_exchange", mutates_args=())
def exchange(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    residual: Tensor,
    eps: float = INTERACTION_EPS,
) -> Tensor:
    """As `reference.exchange`, in four launches.

    input and residual [2, M, C], weights [C, C], biases [C] of one dtype -> [2, M, C]. Statistics,
    score and gate in fp32; d, M d, and residual + x + v are rounded to the input's dtype. Raises
    ValueError on other shapes.
    """
    contracts.exchange(input, gate_weight, gate_bias, value_weight, value_bias, residual)
    x, positions, channels = input.contiguous(), *input.shape[1:]
    launch = config(channels)
    grid = (triton.cdiv(positions, launch.blocks["BLOCK_M"]),)
    constants = {"CHANNELS": channels, "WIDTH": _width(channels), **launch.arguments}
    difference = torch.empty_like(x[0])
    statistics = input.new_empty(5, positions, dtype=torch.float32)
    _exchange_difference_kernel[grid](
        x, gate_bias, difference, statistics, positions, eps, **constants
    )
    projected = F.linear(difference, gate_weight)
    mixed, out = torch.empty_like(x), torch.empty_like(x)
    _exchange_mix_kernel[grid](
        x, projected, statistics, value_bias, residual.contiguous(), mixed, out, positions,
        **constants,
    )  # fmt: skip
    out.view(-1, channels).addmm_(mixed.view(-1, channels), value_weight.t())
    return out


@exchange.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


flops.register("exchange", "composed_exchange")


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Both kernels at SD-1.5 shapes, which have no other candidates."""
    kernels = {"difference": _exchange_difference_kernel, "mix": _exchange_mix_kernel}
    return [
        listing.compilation(
            "composed_exchange",
            f"C={channels} {part}",
            kernel,
            dtype,
            config(channels),
            {"CHANNELS": channels, "WIDTH": _width(channels)},
            types={"statistics_ptr": "*fp32"},
            tensor_cores=False,
        )
        for dtype in TRITON_TYPES
        for channels in (320, 640, 1280)
        for part, kernel in kernels.items()
    ]
