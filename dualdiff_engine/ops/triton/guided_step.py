"""Classifier-free guidance in one pass over the two rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dualdiff_engine.ops import contracts, flops
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation, compilation
from dualdiff_engine.ops.triton.tuning import Config

CONFIG = Config({"BLOCK": 1024}, num_warps=4, num_stages=1)


@triton.jit
def _guided_step_kernel(
    noise_ptr,  # [F, 2, size], rows (uncond, cond)
    out_ptr,  # [F, size] fp32
    size,
    guidance,
    BLOCK: tl.constexpr,
):
    """out[f] = u + s (c - u); grid (blocks, F)."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    branch = tl.program_id(1).to(tl.int64)
    mask = offsets < size
    uncond_ptr = noise_ptr + 2 * branch * size + offsets
    uncond = tl.load(uncond_ptr, mask=mask).to(tl.float32)
    cond = tl.load(uncond_ptr + size, mask=mask).to(tl.float32)
    tl.store(out_ptr + branch * size + offsets, uncond + guidance * (cond - uncond), mask=mask)


@torch.library.custom_op("dualdiff::guided_step", mutates_args=())
def guided_step(noise: Tensor, guidance: float) -> Tensor:
    """As `reference.guided_step`; noise contiguous [F, 2, B, ...]."""
    contracts.guided_step(noise)
    contracts.contiguous("guided_step", "noise", noise)
    out = noise.new_empty(noise.shape[0], *noise.shape[2:], dtype=torch.float32)
    size = out[0].numel()
    grid = (triton.cdiv(size, CONFIG.blocks["BLOCK"]), noise.shape[0])
    _guided_step_kernel[grid](noise, out, size, guidance, **CONFIG.arguments)
    return out


@guided_step.register_fake
def _(noise: Tensor, guidance: float) -> Tensor:
    return noise.new_empty(noise.shape[0], *noise.shape[2:], dtype=torch.float32)


flops.register("guided_step", "guided_step")


def compilations(every_candidate: bool = False) -> list[Compilation]:
    """The one configuration, which serves every shape: there are no candidates."""
    types = {"out_ptr": "*fp32"}
    return [
        compilation(
            "guided_step", "", _guided_step_kernel, dtype, CONFIG, {},
            types=types, tensor_cores=False,
        )
        for dtype in TRITON_TYPES
    ]  # fmt: skip
