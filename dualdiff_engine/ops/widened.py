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

OPS = ("linear", "branch_linear", "exchange", "geglu")


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if op not in OPS:
        return False, f"has no {op}"
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False, "serves bf16 on the CPU"
    return True, "bf16 products computed in fp32: takes as long as float32, needs half its memory"


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `reference.linear`, rounded once."""
    out = F.linear(input.float(), weight.float(), None if bias is None else bias.float())
    return (out if residual is None else out.add_(residual)).to(input.dtype)


branch_linear = partial(reference.branch_linear, linear=linear)
exchange = partial(reference.exchange, linear=linear)
geglu = partial(reference.geglu, linear=linear)
