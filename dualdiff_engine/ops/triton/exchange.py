"""The exchange between the branches in one launch, for any number of channels.

A program owns some positions of both branches. Their rows stay in the caches while the program
walks the two weights. Normalised values are computed again for every tile: that costs a few
operations per product and saves every intermediate tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation
from dualdiff_engine.ops.triton.tuning import Config


@triton.jit
def _normed(
    row_ptr,  # [BLOCK_M, 1], pointers to rows of one branch
    columns,
    mask,
    moments,
):
    """(x - mean) / deviation of rows at some columns, in fp32; moments as of `_moments`."""
    mean, rstd = moments
    x = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return (x - mean[:, None]) * rstd[:, None]


@triton.jit
def _moments(
    row_ptr,  # [BLOCK_M, 1], pointers to rows of one branch
    mask_m,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """(mean, reciprocal deviation) of rows; the mean is subtracted before squaring."""
    sums = tl.zeros([row_ptr.shape[0]], tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(row_ptr + columns, mask=mask_m & (columns < CHANNELS), other=0.0)
        sums += tl.sum(x.to(tl.float32), 1)
    mean = sums / CHANNELS
    squares = tl.zeros([row_ptr.shape[0]], tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)[None, :]
        mask = mask_m & (columns < CHANNELS)
        x = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += tl.sum(centred * centred, 1)
    return mean, tl.rsqrt(squares / CHANNELS + eps)


@triton.jit
def _weight_tile(
    weight_ptr,  # [C, C]
    first_n,
    first_k,
    CHANNELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[BLOCK_K, BLOCK_N] of the transposed weight; zero outside."""
    rows = first_n + tl.arange(0, BLOCK_N)[None, :]
    columns = first_k + tl.arange(0, BLOCK_K)[:, None]
    mask = (rows < CHANNELS) & (columns < CHANNELS)
    return tl.load(weight_ptr + rows * CHANNELS + columns, mask=mask, other=0.0)


# a count of 1 would become a constant, which has no `to`
@triton.jit(do_not_specialize=["positions"])
def _exchange_kernel(
    input_ptr,  # [2, positions, C]
    gate_weight_ptr,  # [C, C]
    gate_bias_ptr,  # [C]
    value_weight_ptr,  # [C, C]
    value_bias_ptr,  # [C]
    residual_ptr,  # [2, positions, C]
    positions,
    out_ptr,  # [2, positions, C]
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M positions of both branches; grid (blocks,).

    Inputs, integers, output: the order in which TensorRT passes them to a plugin's kernel.
    """
    offsets_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = (offsets_m < positions)[:, None]
    rows = offsets_m.to(tl.int64)[:, None] * CHANNELS
    branch = positions.to(tl.int64) * CHANNELS
    row_0, row_1 = input_ptr + rows, input_ptr + branch + rows
    moments_0 = _moments(row_0, mask_m, eps, CHANNELS, BLOCK_K)
    moments_1 = _moments(row_1, mask_m, eps, CHANNELS, BLOCK_K)
    dtype = input_ptr.dtype.element_ty

    score_0 = tl.zeros([BLOCK_M], tl.float32)
    score_1 = tl.zeros([BLOCK_M], tl.float32)
    for first_n in range(0, CHANNELS, BLOCK_N):
        projected = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_k in range(0, CHANNELS, BLOCK_K):
            columns = first_k + tl.arange(0, BLOCK_K)[None, :]
            mask = mask_m & (columns < CHANNELS)
            normed_0 = _normed(row_0, columns, mask, moments_0)
            difference = normed_0 - _normed(row_1, columns, mask, moments_1)
            weight = _weight_tile(gate_weight_ptr, first_n, first_k, CHANNELS, BLOCK_N, BLOCK_K)
            projected = tl.dot(difference.to(dtype), weight, projected, input_precision="ieee")
        offsets_n = first_n + tl.arange(0, BLOCK_N)
        mask_n = offsets_n < CHANNELS
        mask = mask_m & mask_n[None, :]
        normed_0 = _normed(row_0, offsets_n[None, :], mask, moments_0)
        normed_1 = _normed(row_1, offsets_n[None, :], mask, moments_1)
        bias = tl.load(gate_bias_ptr + offsets_n, mask=mask_n, other=0.0).to(tl.float32)
        # m·d, the same for both branches
        offset = (normed_0 - normed_1) * bias[None, :]
        score_0 += tl.sum(normed_0 * projected + offset, 1)
        score_1 += tl.sum(normed_1 * projected + offset, 1)
    gate_0 = tl.sigmoid(score_0)[:, None]
    gate_1 = tl.sigmoid(score_1)[:, None]

    for first_n in range(0, CHANNELS, BLOCK_N):
        mixed_0 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        mixed_1 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first_k in range(0, CHANNELS, BLOCK_K):
            columns = first_k + tl.arange(0, BLOCK_K)[None, :]
            mask = mask_m & (columns < CHANNELS)
            normed_1 = _normed(row_1, columns, mask, moments_1)
            difference = _normed(row_0, columns, mask, moments_0) - normed_1
            weight = _weight_tile(value_weight_ptr, first_n, first_k, CHANNELS, BLOCK_N, BLOCK_K)
            mix_0 = (normed_1 + gate_0 * difference).to(dtype)
            mix_1 = (normed_1 + gate_1 * difference).to(dtype)
            mixed_0 = tl.dot(mix_0, weight, mixed_0, input_precision="ieee")
            mixed_1 = tl.dot(mix_1, weight, mixed_1, input_precision="ieee")
        offsets_n = first_n + tl.arange(0, BLOCK_N)[None, :]
        mask_n = offsets_n < CHANNELS
        mask = mask_m & mask_n
        bias = tl.load(value_bias_ptr + offsets_n, mask=mask_n, other=0.0).to(tl.float32)
        offsets = rows + offsets_n
        _add_and_store(input_ptr, residual_ptr, out_ptr, offsets, mask, mixed_0 + bias)
        _add_and_store(input_ptr, residual_ptr, out_ptr, branch + offsets, mask, mixed_1 + bias)


@triton.jit
def _add_and_store(
    input_ptr,  # [2, positions, C]
    residual_ptr,  # [2, positions, C]
    out_ptr,  # [2, positions, C]
    offsets,
    mask,
    value,
):
    """out = input + residual + value at the same offsets of all three, rounded once."""
    value += tl.load(input_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask=mask)


def shape_class(channels: int, dtype: torch.dtype) -> str:
    """The row of a tuning table."""
    return tuning.key(C=channels, dtype=dtype)


def _config(rows: int, columns: int, depth: int, num_warps: int, num_stages: int) -> Config:
    blocks = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_K": depth}
    return Config(blocks, num_warps, num_stages)


def default_config(dtype: torch.dtype) -> Config:
    """What compiles without spills for every architecture."""
    if dtype == torch.float32:
        return _config(32, 32, 16, num_warps=4, num_stages=1)
    return _config(64, 64, 32, num_warps=4, num_stages=2)


def candidates(dtype: torch.dtype) -> list[Config]:
    """What is worth measuring for any number of channels."""
    if dtype == torch.float32:
        return [default_config(dtype), _config(32, 64, 16, 8, 1)]
    return [
        default_config(dtype),
        _config(64, 64, 64, 4, 2),
        _config(64, 64, 64, 4, 3),
        _config(64, 128, 32, 8, 2),
        _config(64, 128, 64, 8, 2),
        _config(128, 64, 32, 8, 2),
        _config(128, 64, 64, 8, 3),
        _config(128, 128, 32, 8, 2),
    ]


@torch.library.custom_op("dualdiff::exchange", mutates_args=())
def exchange(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    residual: Tensor,
    eps: float = INTERACTION_EPS,
) -> Tensor:
    """As `reference.exchange`: residual + x + V (x̂_1 + gate_f d) + v, gate_f from M, m.

    input and residual [2, M, C], weights [C, C], biases [C], all contiguous and of one dtype ->
    [2, M, C]. Statistics, score, gate and sums in fp32; the operands of products in the input's
    dtype. Raises ValueError on other shapes.
    """
    channels = input.shape[-1]
    square, line = (channels, channels), (channels,)
    shapes = [gate_weight.shape, gate_bias.shape, value_weight.shape, value_bias.shape]
    fits = input.dim() == 3 and input.shape[0] == 2 and residual.shape == input.shape
    if not fits or shapes != [square, line, square, line]:
        got = [list(x.shape) for x in (input, gate_weight, gate_bias, value_weight, value_bias)]
        raise ValueError(
            "exchange takes input and residual [2, M, C], weights [C, C] and biases [C]; "
            f"got {got} and residual {list(residual.shape)}"
        )
    out = input.new_empty(input.shape)
    config = tuning.choose(
        "exchange", shape_class(channels, input.dtype), default_config(input.dtype), input.device
    )
    positions = input.shape[1]
    grid = (triton.cdiv(positions, config.blocks["BLOCK_M"]),)
    _exchange_kernel[grid](
        input.contiguous(), gate_weight.contiguous(), gate_bias, value_weight.contiguous(),
        value_bias, residual.contiguous(), positions, out, eps,
        CHANNELS=channels, **config.arguments,
    )  # fmt: skip
    return out


@exchange.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


flops.register("exchange", "exchange")


def compilation(
    channels: int,
    dtype: torch.dtype,
    config: Config,
    *,
    eps: float | None = None,
    gate_bias: torch.dtype | None = None,
) -> Compilation:
    """What the compiler must know for an input [2, M, channels].

    eps: compiled in, where a launch cannot pass it. gate_bias: its dtype, by default the input's.
    """
    constants = {"CHANNELS": channels} | ({} if eps is None else {"eps": eps})
    types = {"gate_bias_ptr": f"*{TRITON_TYPES[gate_bias or dtype]}"}
    return listing.compilation(
        "exchange", f"C={channels}", _exchange_kernel, dtype, config, constants, types=types
    )


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at SD-1.5 shapes; with every_candidate what tuning may choose as well."""
    return [
        compilation(channels, dtype, config)
        for dtype in TRITON_TYPES
        for channels in (320, 640, 1280)
        for config in listing.configs(default_config(dtype), candidates(dtype), every_candidate)
    ]
