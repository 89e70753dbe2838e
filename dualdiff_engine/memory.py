"""Memory of the machine: how freed blocks are kept on a CPU, and what running out looks like."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import torch

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP = 2**31 - 1
_GROW = 64 << 20


def keep_freed_blocks() -> bool:
    """Let glibc reuse freed blocks of any size instead of handing them back to the system.

    Activations of tens of megabytes come and go in every layer. By default each is a fresh mapping
    whose pages fault in one by one, which costs more than the arithmetic of a norm or a GELU. Holds
    for the whole process. Returns whether it took effect (glibc only).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _GROW))
    )


def release_freed_blocks() -> None:
    """Hand what loading left behind back to the system, before the peak of a run is set."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch failed to allocate; on a CPU it says so only in words."""
    words = ("not enough memory", "can't allocate memory", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def spare_bytes(device: torch.device) -> int:
    """Bytes that may be spent on caching: a quarter of what is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024 // 4
    except (OSError, KeyError, ValueError):
        return 1 << 30
