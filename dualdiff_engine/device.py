"""Where an engine runs: its device, its dtype, and the memory of the machine."""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.errors import DualDiffError, OutOfMemoryError, SettingsError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP = 2**31 - 1
_GROW = 64 << 20


def device_of(device: str | torch.device) -> torch.device:
    """The device that a name means; auto is the GPU if there is one. Raises SettingsError."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingsError(f"no device {device!r}: use cpu, cuda, cuda:0, … or auto") from error
    if chosen.type not in ("cpu", "cuda"):
        raise SettingsError(f"device {str(chosen)!r} is not supported: use cpu or cuda")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingsError(
            f"device {str(chosen)!r}: this machine or this PyTorch has no CUDA; use cpu"
        )
    return chosen


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name means; auto: fp32 on a CPU, bf16 on a GPU. Raises SettingsError."""
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise SettingsError(f"dtype must be auto, {', '.join(_DTYPES)}; got {dtype!r}")
    if chosen is torch.float16 and device.type == "cpu":
        raise SettingsError(
            "float16 on a CPU is emulated and hundreds of times slower: use bfloat16"
        )
    return chosen


@contextmanager
def numerics(device: torch.device, tf32: bool) -> Iterator[None]:
    """On a GPU, within the block: cuDNN measures its kernels, and float32 is TF32 only if asked.

    PyTorch's own settings let cuDNN round float32 to TF32, 10 bits. They hold for the process and
    are restored afterwards, whatever happens. On a CPU nothing changes.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, tf32, tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def tf32_of(tf32: bool, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether float32 may be rounded to TF32. Raises SettingsError where there is no such thing."""
    if tf32 and (device.type != "cuda" or dtype != torch.float32):
        raise SettingsError(
            f"tf32 is for float32 on a GPU; the engine is {dtype} on {device}: leave it out"
        )
    return tf32


def devices() -> dict[str, Any]:
    """The devices of this machine by PyTorch's name, JSON-ready."""
    found: dict[str, Any] = {"cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()}}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory, capability = round(gpu.total_memory / 2**30), f"{gpu.major}.{gpu.minor}"
        found[f"cuda:{number}"] = {"name": gpu.name, "GiB": memory, "capability": capability}
    return found if len(found) > 1 else {**found, "cuda": {}}


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


# how libraries say that memory ran out: PyTorch, safetensors' mapping, ONNX Runtime on both
# devices, C++, cuBLAS and cuDNN, oneDNN, the operating system
_OUT_OF_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|cannot allocate memory|DefaultCPUAllocator"
    r"|unable to mmap|failed to allocate|bad[_ ]alloc|out of memory|STATUS_ALLOC_FAILED"
    r"|cudaErrorMemoryAllocation|could not create a memory|could not create a primitive$",
    re.IGNORECASE | re.MULTILINE,
)
# oneDNN says this when memory ran out, and also when it cannot compile its kernels at all
_AMBIGUOUS = re.compile(r"could not create a primitive$", re.MULTILINE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in what an error was raised from.

    Many libraries have no class for it and say so only in words.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(cause, Exception) and _OUT_OF_MEMORY.search(str(cause)):
            return True
        cause = cause.__cause__
    return False


def onednn_refuses(message: str) -> bool:
    """Whether an error's message is oneDNN's, and for another reason than memory.

    Then oneDNN creates no kernel at all, not even one of 64 numbers. To be called when the tensors
    of the failed call are gone.
    """
    if not _AMBIGUOUS.search(message):
        return False
    # oneDNN keeps kernels by shape: one that was never asked for has to be created
    side = next(_SIDES)
    picture, weight = torch.zeros(1, 1, 1, side), torch.zeros(1, 1, 1, side)
    try:
        torch.ops.aten.mkldnn_convolution(picture, weight, None, [0, 0], [1, 1], [1, 1], 1)
    except RuntimeError:
        return True
    return False


_SIDES = itertools.count(64)


@contextmanager
def enough_memory(doing: str, remedy: str) -> Iterator[None]:
    """Within the block, whatever says that memory ran out becomes one OutOfMemoryError."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(doing, remedy) from error


def release_memory(device: torch.device) -> None:
    """Hand back what allocators keep for later calls, so that another kind of call finds room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    release_freed_blocks()


# errors after which every call on the GPU fails until the process ends, in the words and names of
# CUDA (CUDA Runtime API, cudaError: those that leave the process in an inconsistent state)
_LOST = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|illegal instruction"
    r"|misaligned address|invalid program counter|hardware stack error|launch timed out"
    r"|not supported on global/shared address space|uncorrectable (ECC|NVLink) error"
    r"|(cudaError|CUDA_ERROR_)(Illegal|ILLEGAL_|Launch(Failure|Timeout)|LAUNCH_(FAILED|TIMEOUT)"
    r"|Assert|ASSERT|Misaligned|MISALIGNED_|InvalidPc|INVALID_PC|HardwareStack|HARDWARE_STACK"
    r"|InvalidAddressSpace|INVALID_ADDRESS_SPACE|ECC)"
)


def is_device_lost(error: BaseException, device: torch.device) -> bool:
    """Whether the GPU can only be used again by another process.

    Our own errors are not looked at, what they were raised from is: they quote their callers.
    """
    link: BaseException | None = error
    while link is not None:
        if not isinstance(link, DualDiffError) and _LOST.search(str(link)):
            return True
        link = link.__cause__ or link.__context__
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def spare_bytes(device: torch.device) -> int:
    """Bytes that may be spent on caching: a quarter of what is free now.

    On a CPU the limit of the container counts where it is below the machine's.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    free = [x for x in (_free_in_machine(), _free_in_container()) if x is not None]
    return min(free, default=4 << 30) // 4


def _free_in_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _free_in_container(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a cgroup leaves, version 2 or 1; None without a limit."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            # "max" where there is no limit
            return max(0, int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            continue
    return None
