"""bf16 on a CPU whose instructions do not multiply bf16: products in fp32, results rounded to bf16.

PyTorch's own bf16 product falls back to plain loops there, 5 to 14 times slower than fp32. Widening
the operands costs one pass over them. Every sum is in fp32, as where processors multiply bf16.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.ops import reference

OPS = ("linear", "branch_linear", "exchange", "merge", "geglu")
COST = "products and convolutions of bf16 computed in fp32: as slow as float32, in half its memory"


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if op not in OPS:
        return False, f"has no {op}"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False, "serves bf16 on the CPU"
    return True, COST


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `reference.linear`, rounded once."""
    out = F.linear(input.float(), weight.float(), None if bias is None else bias.float())
    return (out if residual is None else out.add_(residual)).to(input.dtype)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
) -> Tensor:
    """As `torch.nn.functional.conv2d`, rounded once. input [N, C, h, w], weight [D, C, k, k]."""
    bias = None if bias is None else bias.float()
    return F.conv2d(input.float(), weight.float(), bias, stride, padding).to(input.dtype)


branch_linear = partial(reference.branch_linear, linear=linear)
exchange = partial(reference.exchange, linear=linear)
merge = partial(reference.merge, linear=linear)
geglu = partial(reference.geglu, linear=linear)
