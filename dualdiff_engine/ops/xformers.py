"""Attention by xFormers' memory-efficient kernel, where that library and a GPU are there."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch import Tensor

from dualdiff_engine.ops import flops, reference


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if op != "attention":
        return False, f"has no {op}"
    if importlib.util.find_spec("xformers") is None:
        return False, "xFormers is not installed: pip install dualdiff-engine[xformers]"
    if reason := _does_not_run(device, dtype):
        return False, reason
    return True, "xFormers' memory-efficient attention"


def proven(device: torch.device) -> tuple[bool, str]:
    """`auto` does not choose it: a GPU has it as a peer to beat."""
    return False, "only on request"


@functools.cache
def _does_not_run(device: torch.device, dtype: torch.dtype) -> str | None:
    """Its wheels are built for one PyTorch each, so the smallest call is asked."""
    x = torch.zeros(1, 16, 1, 40, device=device, dtype=dtype)
    try:
        memory_efficient(x, x, x)
    except (ImportError, RuntimeError, NotImplementedError) as error:
        return f"xFormers does not run here: {str(error).strip().splitlines()[0]}"
    return None


def memory_efficient(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [N, S, H, D], key and value [N, L, H, D] -> [N, S, H, D]."""
    return importlib.import_module("xformers.ops").memory_efficient_attention(query, key, value)


def _one_source(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    heads = (x.unflatten(-1, (num_heads, -1)) for x in (query, key, value))
    return memory_efficient(*heads).flatten(2)


@torch.library.custom_op("dualdiff::xformers_attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    more_key: Tensor | None = None,
    more_value: Tensor | None = None,
) -> Tensor:
    """As `reference.attention`; the second source is appended to the first."""
    out = reference.attention(
        query, key, value, num_heads, more_key, more_value, attend=_one_source
    )
    return out.contiguous()


@attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


flops.register("attention", "xformers_attention")
