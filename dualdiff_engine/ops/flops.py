"""FLOPs of the ops, as PyTorch counts them: products of matrices, one multiply-add as two."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import register_flop_formula


def linear(input_shape: torch.Size, weight_shape: torch.Size, *_: object, **__: object) -> int:
    """Of branch_linear too, and of geglu, whose weight makes both halves."""
    return 2 * math.prod(input_shape) * weight_shape[-2]


def attention(
    query_shape: torch.Size,
    key_shape: torch.Size,
    value_shape: torch.Size,
    num_heads: int,
    more_key_shape: torch.Size | None = None,
    *_: object,
    **__: object,
) -> int:
    keys = key_shape[1] + (0 if more_key_shape is None else more_key_shape[1])
    return 4 * math.prod(query_shape) * keys


def exchange(input_shape: torch.Size, *_: object, **__: object) -> int:
    positions, channels = input_shape[1:]
    return 3 * 2 * positions * channels * channels


def merge(input_shape: torch.Size, *_: object, **__: object) -> int:
    positions, channels = input_shape[1:]
    return 2 * 2 * positions * channels * channels


def align(query_shape: torch.Size, key_shape: torch.Size, *_: object, **__: object) -> int:
    # the attention, and the mean score
    return 4 * math.prod(query_shape) * key_shape[1] + 2 * math.prod(query_shape)


def elementwise(*_: object, **__: object) -> int:
    """Counts as none, as in PyTorch's own formulas."""
    return 0


FORMULAS: dict[str, Callable[..., int]] = {
    "linear": linear,
    "branch_linear": linear,
    "attention": attention,
    "exchange": exchange,
    "merge": merge,
    "align": align,
    "group_norm_silu": elementwise,
    "geglu": linear,
    "guided_step": elementwise,
}


def register(op: str, operator: str) -> None:
    """Let PyTorch count `torch.ops.dualdiff.<operator>` as the op it computes."""
    register_flop_formula(getattr(torch.ops.dualdiff, operator))(FORMULAS[op])
