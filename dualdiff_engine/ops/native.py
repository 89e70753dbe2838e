"""CPU kernels in C++ (csrc/): attention, align, group_norm_silu; exchange, merge but for products.

Built only when asked for, see setup.py. The best instructions of the processor are chosen when the
extension is loaded. Products of two matrices stay oneDNN's: a fused geglu, built and measured, won
2 % in fp32 and 11 % in bf16 over oneDNN's product, and was left out. A row of a result depends
neither on the rows beside it nor on the number of threads, oneDNN's products aside.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

# loads the OpenMP runtime that the extension then shares
import torch
from torch import Tensor

from dualdiff_engine.ops import contracts, flops, onednn
from dualdiff_engine.ops.reference import FLAT, INTERACTION_EPS

# as oneDNN's ONEDNN_MAX_CPU_ISA: instructions to use instead of the best, or "off"
ISA = "DUALDIFF_NATIVE_ISA"


def _load() -> tuple[Any, str, str]:
    """(the extension or None, its instructions, why it is not there)."""
    asked = os.environ.get(ISA, "")
    if asked == "off":
        return None, "", f"switched off by {ISA}"
    try:
        native = importlib.import_module("dualdiff_engine._native")
        if asked:
            native.use_level(asked)
    except ModuleNotFoundError:
        return None, "", "not built: DUALDIFF_BUILD_NATIVE=cpu pip install ."
    except ImportError as error:
        return None, "", f"the extension cannot be loaded: {error}"
    except ValueError as error:
        return None, "", f"{ISA}={asked}: {error}; it has {', '.join(native.levels())}"
    return native, asked or native.levels()[0], ""


_native, _level, _missing = _load()

# op -> whether part of it is oneDNN's
OPS = {
    "attention": False,
    "exchange": True,
    "merge": True,
    "align": False,
    "group_norm_silu": False,
}
DTYPES = (torch.float32, torch.bfloat16)
ROWS_PER_THREAD = 256
# with one product and fewer intermediates, calls weigh more than caches
MERGED_PER_THREAD = 1024
# of the second source, where there is none
NO_ROWS = (0, 0, 0, 0)


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if device.type != "cpu":
        return False, f"serves the CPU, the engine is on {device.type}"
    if dtype not in DTYPES:
        return False, f"no {dtype} kernels"
    if _missing:
        return False, _missing
    if op not in OPS:
        return False, f"has no {op}"
    if OPS[op]:
        ok, reason = onednn.supported(op, device, dtype)
        if not ok:
            return False, reason
    return True, f"C++ kernels for {_level}"


def _is_bf16(op: str, input: Tensor) -> bool:
    """ValueError unless it is fp32 or bf16 on the CPU; the others are of its dtype."""
    if input.dtype not in DTYPES or input.device.type != "cpu":
        raise ValueError(
            f"{op} takes fp32 or bf16 on the CPU; got {input.dtype} on {input.device.type}"
        )
    return input.dtype == torch.bfloat16


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Address, strides and length of [N, L, C], whose columns are adjacent."""
    return x.data_ptr(), x.stride(0), x.stride(1), x.shape[1]


def _threads() -> int:
    return torch.get_num_threads()


def _runs(rows: int, per_thread: int = ROWS_PER_THREAD) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of rows short enough for their intermediates to stay in the caches.

    New memory costs as much as a product: its pages are mapped one by one.
    """
    step = per_thread * _threads()
    for first in range(0, rows, step):
        yield first, min(step, rows - first)


@torch.library.custom_op("dualdiff::native_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> Tensor:
    """As `reference.attention`: softmax(q [k, k']ᵀ / sqrt(D)) [v, v'] per head.

    query [N, S, C], key and value [N', L, C], more_key and more_value [N', L', C] or neither, with
    L + L' > 0 and N' dividing N -> [N, S, C] contiguous. Rows and batch have any strides; columns
    that are not adjacent are copied. Softmax and sums in fp32; in bf16 the weights are rounded
    before they meet the values where the processor multiplies bf16. Raises ValueError on other
    inputs.
    """
    contracts.attention(query, key, value, num_heads, more_key, more_value)
    bf16 = _is_bf16("attention", query)
    sources = [x for x in (key, value, more_key, more_value) if x is not None]
    out = query.new_empty(query.shape)
    if out.numel():
        adjacent = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, *sources)]
        rows = [_rows(x) for x in adjacent] + [NO_ROWS] * (4 - len(sources))
        batch, _, channels = query.shape
        _native.attention(
            *rows, out.data_ptr(), batch, num_heads, channels // num_heads, key.shape[0], bf16,
            0, 0, _threads(),
        )  # fmt: skip
    return out


@attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("attention", "native_attention")


@torch.library.custom_op("dualdiff::native_exchange", mutates_args=())
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

    input and residual [2, M, C], weights [C, C], biases [C] -> [2, M, C]. What is not contiguous
    is copied. Statistics, scores and gates in fp32; operands of products, and residual + x, in the
    input's dtype. Raises ValueError on other shapes.
    """
    contracts.exchange(input, gate_weight, gate_bias, value_weight, value_bias, residual)
    bf16, channels = _is_bf16("exchange", input), input.shape[-1]
    x, residual = input.contiguous(), residual.contiguous()
    gate_weight, value_weight = gate_weight.contiguous(), value_weight.contiguous()
    gate_bias = gate_bias.float().contiguous()
    out = x.new_empty(x.shape)
    positions = x.shape[1] if channels else 0
    for first, count in _runs(positions):
        offset = first * channels * x.element_size()
        run = (x.data_ptr() + offset, positions * channels, count, channels, bf16, _threads())
        difference = x.new_empty(count, channels)
        moments = x.new_empty(count, 2, 2, dtype=torch.float32)
        _native.normalise_difference(*run, difference.data_ptr(), moments.data_ptr(), eps)
        projected = onednn.product(difference, gate_weight)
        mixed = x.new_empty(2, count, channels)
        _native.mix(
            *run, projected.data_ptr(), gate_bias.data_ptr(), moments.data_ptr(), mixed.data_ptr()
        )
        product = onednn.product(mixed, value_weight, value_bias)
        _native.add(*run, product.data_ptr(), residual.data_ptr() + offset, out.data_ptr() + offset)
    return out


@exchange.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


flops.register("exchange", "native_exchange")


@torch.library.custom_op("dualdiff::native_merge", mutates_args=())
def merge(input: Tensor, weight: Tensor, residual: Tensor, eps: float = INTERACTION_EPS) -> Tensor:
    """As `reference.merge`: residual_f + x_f + G_f (x̂_g - x̂_f), g the other branch.

    input and residual [2, M, C], weight [2, C, C] -> [2, M, C]. What is not contiguous is copied.
    Statistics and sums in fp32; operands and result of the product in the input's dtype. Raises
    ValueError on other shapes.
    """
    contracts.merge(input, weight, residual)
    bf16, channels = _is_bf16("merge", input), input.shape[-1]
    x, residual = input.contiguous(), residual.contiguous()
    weight = weight.contiguous().view(2 * channels, channels)
    out = x.new_empty(x.shape)
    positions = x.shape[1] if channels else 0
    for first, count in _runs(positions, MERGED_PER_THREAD):
        offset = first * channels * x.element_size()
        run = (x.data_ptr() + offset, positions * channels, count, channels, bf16, _threads())
        difference = x.new_empty(count, channels)
        moments = x.new_empty(count, 2, 2, dtype=torch.float32)
        _native.normalise_difference(*run, difference.data_ptr(), moments.data_ptr(), eps)
        product = onednn.product(difference, weight)
        _native.add_merged(
            *run, product.data_ptr(), residual.data_ptr() + offset, out.data_ptr() + offset
        )
    return out


@merge.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


flops.register("merge", "native_merge")


@torch.library.custom_op("dualdiff::native_align", mutates_args=())
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
    graphic [B, S] or [S] or none -> [2, R, B, S, C]. What is not contiguous is copied, but for rows
    of keys and values. Mean scores, bias, softmax and sums in fp32, statistics of maps in fp64.
    Raises ValueError on other inputs.
    """
    contracts.align(query, key, value, num_heads, mean_key, tokens, scale, graphic)
    bf16, (_, rows, pairs, positions, channels) = _is_bf16("align", query), query.shape
    query, mean_key = query.contiguous(), mean_key.contiguous()
    out = query.new_empty(query.shape)
    if not out.numel():
        return out
    width = channels // num_heads
    graphic = None if graphic is None else graphic.float().contiguous().view(-1, positions)
    scores, bias = query.new_empty(2, *query.shape[:-1], dtype=torch.float32)
    # a bias is added to scores before they are multiplied by 1 / sqrt(D)
    _native.alignment_bias(
        query.data_ptr(), mean_key.data_ptr(), 0 if graphic is None else graphic.data_ptr(),
        scores.data_ptr(), bias.data_ptr(), query.shape[1:],
        1 if graphic is None else graphic.shape[0], (channels * num_heads) ** -0.5,
        float(scale) * width**0.5, strength * width**0.5, FLAT, bf16, _threads(),
    )  # fmt: skip
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    tokens = tokens.float().contiguous()
    merged = query.view(2 * rows, pairs * positions, channels)
    _native.attention(
        *map(_rows, (merged, key, value)), NO_ROWS, NO_ROWS, out.data_ptr(), 2 * rows, num_heads,
        width, 2 * rows, bf16, bias.data_ptr(), tokens.data_ptr(), _threads(),
    )  # fmt: skip
    return out


@align.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("align", "native_align")


def _empty_map(input: Tensor) -> Tensor:
    """[N, C, h, w] channels-last, whatever the input's strides."""
    rows, channels, height, width = input.shape
    return input.new_empty(rows, height, width, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("dualdiff::native_group_norm_silu", mutates_args=())
def group_norm_silu(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """As `reference.group_norm_silu`: silu(group_norm(x)).

    input [N, C, h, w], weight and bias [C] -> the same, channels-last; another layout is copied to
    that first. Sums over 64 positions in fp32, of those in fp64. Raises ValueError on other shapes.
    """
    contracts.group_norm_silu(input, num_groups, weight, bias)
    bf16, channels = _is_bf16("group_norm_silu", input), input.shape[1]
    out = _empty_map(input)
    if out.numel():
        x = input.contiguous(memory_format=torch.channels_last)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        _native.group_norm_silu(
            x.data_ptr(), out.data_ptr(), weight.data_ptr(), bias.data_ptr(), x.shape[0],
            x[0, 0].numel(), channels, num_groups, eps, bf16, _threads(),
        )  # fmt: skip
    return out


@group_norm_silu.register_fake
def _(input: Tensor, *_: object) -> Tensor:
    return _empty_map(input)


flops.register("group_norm_silu", "native_group_norm_silu")
