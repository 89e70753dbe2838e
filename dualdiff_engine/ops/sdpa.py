"""PyTorch's own attention kernels for GPUs, one by one: candidates beside the one it would take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualdiff_engine.ops import reference


@dataclass(frozen=True)
class Kernel:
    """A backend of attention alone: that of the reference by one kernel, which may refuse."""

    backend: SDPBackend
    # flash attention takes no bias
    ops: tuple[str, ...] = ("attention", "align")

    def supported(self, op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """Whether this backend serves an op here, and why or why not."""
        if op not in self.ops:
            return False, f"has no {op}"
        if device.type != "cuda":
            return False, f"needs an NVIDIA GPU, the engine is on {device.type}"
        return True, f"scaled_dot_product_attention by {self.backend.name.lower()}"

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_heads: int,
        more_key: Tensor | None = None,
        more_value: Tensor | None = None,
    ) -> Tensor:
        """As `reference.attention`. Raises RuntimeError where the kernel does not fit."""
        with sdpa_kernel(self.backend):
            return reference.attention(query, key, value, num_heads, more_key, more_value)

    def align(self, query: Tensor, *arguments: Any) -> Tensor:
        """As `reference.align`. Raises RuntimeError where the kernel does not fit."""
        with sdpa_kernel(self.backend):
            return reference.align(query, *arguments)


KERNELS = {
    "flash": Kernel(SDPBackend.FLASH_ATTENTION, ("attention",)),
    "cudnn": Kernel(SDPBackend.CUDNN_ATTENTION),
    "efficient": Kernel(SDPBackend.EFFICIENT_ATTENTION),
}
