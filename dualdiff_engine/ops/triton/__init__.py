"""Triton kernels for NVIDIA GPUs: one op per file, each registered as a PyTorch operator.

What an op has besides its fused kernel is a backend of its own, in KERNELS: "triton-composed".

Loading this package does not load Triton; an op's module is loaded when the op is first asked for.
Under TRITON_INTERPRET=1 the same kernels run on a CPU, slowly: that is how they are tested.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# op -> the module that holds it
OPS = {
    "linear": "branch_linear",
    "branch_linear": "branch_linear",
    "attention": "attention",
    "exchange": "exchange",
    "merge": "merge",
    "align": "align",
    "group_norm_silu": "group_norm_silu",
    "geglu": "geglu",
    "guided_step": "guided_step",
}
COMPOSED = {"exchange": "composed_exchange"}
MODULES = (*dict.fromkeys(OPS.values()), *COMPOSED.values())
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# of a proof, where it is longer than the device's: interpreted, a small problem takes seconds
LIMIT_S = 60.0
# Ampere: the first with asynchronous copies and bf16 tensor cores
OLDEST = (8, 0)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter; Triton itself reads this when it is loaded."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supported(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether this backend serves an op here, and why or why not."""
    if op not in OPS:
        return False, f"has no {op}"
    if device.type != "cuda" and not interpreted():
        return False, f"needs an NVIDIA GPU, the engine is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed: pip install dualdiff-engine[triton]"
    if dtype not in DTYPES:
        return False, f"no {dtype} kernels"
    if interpreted():
        return True, "in Triton's interpreter"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return False, "needs compute capability 8.0, this GPU has {}.{}".format(*capability)
    return True, "fused kernel"


def proven(device: torch.device) -> tuple[bool, str]:
    """`auto` takes these kernels call by call, where they were measured as the fastest."""
    if interpreted():
        return False, "interpreted kernels are for tests"
    return device.type != "cuda", "taken where measured as faster: dualdiff tune"


@dataclass(frozen=True)
class Form:
    """A backend of other kernels than `load` gives. modules: op -> the module that holds it."""

    modules: Mapping[str, str]
    LIMIT_S: float = LIMIT_S

    def supported(self, op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
        """As `triton.supported`."""
        if op not in self.modules:
            return False, f"has no {op}"
        ok, reason = supported(op, device, dtype)
        return ok, "kernels around the library's products" if ok and not interpreted() else reason

    def load(self, op: str) -> Callable[..., Tensor]:
        """As `triton.load`."""
        module = importlib.import_module(f"{__name__}.{self.modules[op]}")
        bound: Callable[..., Tensor] = getattr(module, op)
        return bound


KERNELS = {"composed": Form(COMPOSED)}


def load(op: str) -> Callable[..., Tensor]:
    """The op, its module loaded; as attributes of this package the names are the modules'."""
    return getattr(importlib.import_module(f"{__name__}.{OPS[op]}"), op)
