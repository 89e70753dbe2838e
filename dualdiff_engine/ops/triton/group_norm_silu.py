"""GroupNorm and SiLU of channels-last maps: one launch for statistics, one for the rest.

Both cut a map into parts of PART positions, and a program takes some whole groups of one part. So
few maps still fill a GPU, and a program reads contiguous memory: its groups' channels of one
position after the other.

Notations: N maps, P positions, C channels, G groups, GROUPS; WIDTH = C / G channels of a group.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import flops
from dualdiff_engine.ops.triton import listing, tuning
from dualdiff_engine.ops.triton.listing import HALVES, Compilation
from dualdiff_engine.ops.triton.tuning import Config

# channels of a program: as many whole groups as fit, or one that does not
PROGRAM_CHANNELS = 256


@triton.jit
def _sum_groups(x, WIDTH: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr):
    """x [BLOCK_C], per channel -> [BLOCK_G], sums over the WIDTH channels of each group."""
    within = tl.arange(0, BLOCK_W)[None, :]
    channels = tl.arange(0, BLOCK_G)[:, None] * WIDTH + tl.minimum(within, WIDTH - 1)
    spread = tl.gather(x, tl.reshape(channels, [BLOCK_G * BLOCK_W]), 0)
    return tl.sum(tl.where(within < WIDTH, tl.reshape(spread, [BLOCK_G, BLOCK_W]), 0.0), 1)


@triton.jit(do_not_specialize=["positions"])
def _group_norm_statistics_kernel(
    input_ptr,  # [N, P, C]
    statistics_ptr,  # [2, N, parts, G] fp32
    positions,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Mean and sum of squares about it, of every group in a part of a map; both are statistics.

    Grid (blocks of groups, parts, N). Welford's recurrence in every lane; Chan's formula joins
    lanes.
    """
    first = tl.program_id(0) * BLOCK_G
    part = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    channels = tl.arange(0, BLOCK_C)
    group_of = tl.minimum(channels // WIDTH, BLOCK_G - 1)
    inside_c = (channels < BLOCK_G * WIDTH) & (first * WIDTH + channels < GROUPS * WIDTH)
    input_ptr += sample * positions * (GROUPS * WIDTH) + first * WIDTH
    count = tl.zeros([BLOCK_P], tl.float32)
    mean = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, PART, BLOCK_P):
        rows = part * PART + start + tl.arange(0, BLOCK_P)
        inside = rows < positions
        mask = inside[:, None] & inside_c[None, :]
        pointers = input_ptr + rows.to(tl.int64)[:, None] * (GROUPS * WIDTH) + channels[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        count += inside.to(tl.float32)
        delta = tl.where(inside[:, None], x - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(count, 1.0))[:, None]
        squares += delta * (x - mean)
    counted = tl.sum(count, 0)
    group_mean = _sum_groups(tl.sum(mean * count[:, None], 0), WIDTH, BLOCK_G, BLOCK_W)
    group_mean /= counted * WIDTH
    offset = mean - tl.gather(group_mean, group_of, 0)[None, :]
    squares += count[:, None] * offset * offset
    group_squares = _sum_groups(tl.sum(squares, 0), WIDTH, BLOCK_G, BLOCK_W)
    groups = first + tl.arange(0, BLOCK_G)
    statistics_ptr += (sample * tl.num_programs(1) + part) * GROUPS + groups
    tl.store(statistics_ptr, group_mean, mask=groups < GROUPS)
    half = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * GROUPS
    tl.store(statistics_ptr + half, group_squares, mask=groups < GROUPS)


@triton.jit(do_not_specialize=["positions"])
def _group_norm_silu_kernel(
    input_ptr,  # [N, P, C]
    statistics_ptr,  # [2, N, parts, G] fp32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    out_ptr,  # [N, P, C]
    positions,
    eps,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """out = silu((x - mean) · weight / sqrt(variance + eps) + bias) for a part of a map.

    Grid as of the statistics; PARTS >= the number of parts.
    """
    first = tl.program_id(0) * BLOCK_G
    part = tl.program_id(1)
    # backwards: the maps whose statistics were last taken may still be in the L2 cache
    sample = (tl.num_programs(2) - 1 - tl.program_id(2)).to(tl.int64)
    groups = first + tl.arange(0, BLOCK_G)
    parts = tl.arange(0, PARTS)
    mask = (parts < tl.num_programs(1))[:, None] & (groups < GROUPS)[None, :]
    statistics_ptr += sample * tl.num_programs(1) * GROUPS
    pointers = statistics_ptr + parts[:, None] * GROUPS + groups[None, :]
    half = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * GROUPS
    means = tl.load(pointers, mask=mask, other=0.0)
    squares = tl.load(pointers + half, mask=mask, other=0.0)
    count = tl.maximum(tl.minimum(positions - parts * PART, PART), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / positions
    offset = means - mean[None, :]
    variance = tl.sum(squares + WIDTH * count * offset * offset, 0) / (WIDTH * positions)

    channels = tl.arange(0, BLOCK_C)
    group_of = tl.minimum(channels // WIDTH, BLOCK_G - 1)
    inside_c = (channels < BLOCK_G * WIDTH) & (first * WIDTH + channels < GROUPS * WIDTH)
    weight = tl.load(weight_ptr + first * WIDTH + channels, mask=inside_c, other=0.0)
    bias = tl.load(bias_ptr + first * WIDTH + channels, mask=inside_c, other=0.0)
    channel_mean = tl.gather(mean, group_of, 0)[None, :]
    scale = (weight.to(tl.float32) * tl.gather(tl.rsqrt(variance + eps), group_of, 0))[None, :]
    shift = bias.to(tl.float32)[None, :]
    base = sample * positions * (GROUPS * WIDTH) + first * WIDTH
    for start in range(0, PART, BLOCK_P):
        rows = part * PART + start + tl.arange(0, BLOCK_P)
        offsets = base + rows.to(tl.int64)[:, None] * (GROUPS * WIDTH) + channels[None, :]
        inside = (rows < positions)[:, None] & inside_c[None, :]
        x = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        y = (x - channel_mean) * scale + shift
        tl.store(out_ptr + offsets, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=inside)


def shape_class(positions: int, channels: int, num_groups: int, dtype: torch.dtype) -> str:
    """The row of a tuning table. The batch is not in it: results do not depend on its size."""
    return tuning.key(P=positions, C=channels, G=num_groups, dtype=dtype)


def _config(
    part: int, channels: int, width: int, num_groups: int, rows: int, num_warps: int
) -> Config:
    """Parts of `part` positions and up to `channels` channels, `rows` positions at a time."""
    most = min(max(1, channels // width), triton.next_power_of_2(num_groups))
    groups = 1 << (most.bit_length() - 1)
    blocks = {
        "PART": part,
        "BLOCK_P": min(rows, part),
        "BLOCK_C": triton.next_power_of_2(groups * width),
        "BLOCK_G": groups,
    }
    return Config(blocks, num_warps, num_stages=1)


def _part(positions: int) -> int:
    """Positions of a part: four times the parts, all of whose statistics every program reads."""
    return max(16, triton.next_power_of_2(2 * math.isqrt(positions)))


def default_config(positions: int, channels: int, num_groups: int) -> Config:
    """What compiles without spills for every architecture."""
    width = channels // num_groups
    # a group wider than usual takes fewer positions at a time
    widest = max(PROGRAM_CHANNELS, triton.next_power_of_2(width))
    rows = max(1, 16 * PROGRAM_CHANNELS // widest)
    return _config(_part(positions), PROGRAM_CHANNELS, width, num_groups, rows, num_warps=8)


def candidates(positions: int, channels: int, num_groups: int) -> list[Config]:
    """What is worth measuring, at most 8; values of a thread, and one other part and width each."""
    width, part = channels // num_groups, _part(positions)
    # part, channels, values of a thread, warps
    tiles = [(part, 256, values, num_warps) for num_warps in (4, 8) for values in (8, 16, 32)]
    tiles[-1:] = [(part, 512, 16, 8), (part // 2, 256, 16, 8), (2 * part, 256, 16, 8)]
    return [
        _config(length, wide, width, num_groups, values * num_warps * 32 // wide, num_warps)
        for length, wide, values, num_warps in tiles
    ]


def _constants(
    positions: int, channels: int, num_groups: int, config: Config
) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time arguments of both kernels, without blocks: of statistics, of the rest."""
    width = channels // num_groups
    parts = triton.cdiv(positions, config.blocks["PART"])
    both = {"WIDTH": width, "GROUPS": num_groups}
    return (
        {**both, "BLOCK_W": triton.next_power_of_2(width)},
        {**both, "PARTS": triton.next_power_of_2(parts)},
    )


@torch.library.custom_op("dualdiff::group_norm_silu", mutates_args=())
def group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """silu((x - mean) / sqrt(variance + eps) · weight + bias), over each group of a map.

    input [N, C, h, w], weight [C], bias [C] -> [N, C, h, w] channels-last. Input of another layout
    is copied. All arithmetic in fp32; the mean is subtracted before squaring. Raises ValueError on
    other shapes.
    """
    if (
        input.dim() != 4
        or input.shape[1] % num_groups
        or not weight.shape == bias.shape == input.shape[1:2]
    ):
        got = ", ".join(str(list(x.shape)) for x in (input, weight, bias))
        raise ValueError(
            f"group_norm_silu takes input [N, C, h, w] of C in {num_groups} groups, weight [C], "
            f"bias [C]; got {got}"
        )
    samples, channels, height, width = input.shape
    positions = height * width
    config = tuning.choose(
        "group_norm_silu",
        shape_class(positions, channels, num_groups, input.dtype),
        default_config(positions, channels, num_groups),
        input.device,
    )
    parts = triton.cdiv(positions, config.blocks["PART"])
    grid = (triton.cdiv(num_groups, config.blocks["BLOCK_G"]), parts, samples)
    x = input.contiguous(memory_format=torch.channels_last)
    out = _like(input)
    statistics = input.new_empty(2, samples, parts, num_groups, dtype=torch.float32)
    for_statistics, for_norm = _constants(positions, channels, num_groups, config)
    _group_norm_statistics_kernel[grid](
        x, statistics, positions, **for_statistics, **config.arguments
    )
    _group_norm_silu_kernel[grid](
        x, statistics, weight, bias, out, positions, eps, **for_norm, **config.arguments
    )
    return out


def _like(input: Tensor) -> Tensor:
    samples, channels, height, width = input.shape
    return input.new_empty(samples, height, width, channels).permute(0, 3, 1, 2)


@group_norm_silu.register_fake
def _(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _like(input)


flops.register("group_norm_silu", "group_norm_silu")


# of SD-1.5, which has 32 groups: positions -> channels of maps
MAPS = {
    4096: (320, 640, 960),
    1024: (320, 640, 960, 1280, 1920),
    256: (640, 1280, 1920, 2560),
    64: (1280, 2560),
}
NUM_GROUPS = 32


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """Every default at SD-1.5 shapes, fp32 at one of the widest.

    With every_candidate, what tuning may choose as well.
    """
    halves = [(d, p, c) for d in HALVES for p, widths in MAPS.items() for c in widths]
    kernels = {"statistics": _group_norm_statistics_kernel, "norm": _group_norm_silu_kernel}
    listed = []
    for dtype, positions, channels in (*halves, (torch.float32, 4096, 960)):
        shape = (positions, channels, NUM_GROUPS)
        choices = listing.configs(default_config(*shape), candidates(*shape), every_candidate)
        listed += [
            listing.compilation(
                "group_norm_silu", f"P={positions} C={channels} {part}", kernel, dtype, config,
                constants, types={"statistics_ptr": "*fp32"}, tensor_cores=False,
            )
            for config in choices
            for (part, kernel), constants in zip(
                kernels.items(), _constants(*shape, config), strict=True
            )
        ]  # fmt: skip
    return listed
