"""CPU matrix products through the oneDNN that PyTorch bundles.

On processors that are not Intel's, `F.linear` in fp32 ends in a library that does not use their
AVX-512 units; oneDNN does, at about twice the rate. In bf16 both end in oneDNN, and its linear
still skips a copy of the bias. Everything else is the reference op.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dualdiff_engine.ops import contracts, flops, reference

OPS = ("linear", "branch_linear", "exchange", "merge", "geglu")


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if op not in OPS:
        return False, f"has no {op}"
    if device.type != "cpu":
        return False, f"oneDNN serves the CPU, the engine is on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return False, f"no {dtype} product in oneDNN on CPU"
    if not torch.backends.mkldnn.is_available():
        return False, "this PyTorch was built without oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False, "this PyTorch does not expose oneDNN's linear"
    return True, "fp32 and bf16 products at the rate of the vector units"


def product(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `linear`, unchecked, for use inside another operator."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    if residual is None:
        return pointwise(input, weight, bias, "none", [], "")
    return pointwise.binary(input, residual, weight, bias, "add")


# an operator of its own: PyTorch's, with a residual, has no shapes for torch.compile
@torch.library.custom_op("dualdiff::onednn_linear", mutates_args=())
def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """As `reference.linear`; weight must be contiguous. Raises ValueError on other shapes."""
    contracts.linear(input, weight, bias, residual)
    return product(input, weight, bias, residual)


@linear.register_fake
def _(input: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


flops.register("linear", "onednn_linear")

branch_linear = partial(reference.branch_linear, linear=linear)
exchange = partial(reference.exchange, linear=linear)
merge = partial(reference.merge, linear=linear)
geglu = partial(reference.geglu, linear=linear)
