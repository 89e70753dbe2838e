"""What a caller asked for, checked before anything is computed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.ops import Ops
from dualdiff_engine.settings import require_seed

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(device: str | torch.device) -> torch.device:
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


def cuda_graph_of(wanted: bool | None, device: torch.device, ops: Ops) -> bool:
    """By default where Triton's kernels serve attention on a GPU."""
    if wanted and device.type != "cuda":
        raise SettingsError(f"cuda_graph needs an NVIDIA GPU, the engine is on {device}")
    if wanted is not None:
        return wanted
    row = next(row for row in ops.table if row.op == "attention")
    return device.type == "cuda" and row.backend == "triton"


def size_of(size: int | Sequence[int] | None, default: int) -> tuple[int, int]:
    """(height, width) in pixels."""
    if size is None:
        return default, default
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        return size[0], size[1]
    raise SettingsError(f"size must be one number or (height, width), got {size!r}")


def seeds_of(
    n: int | Sequence[int] | None, seeds: Sequence[int] | None, given: int | None
) -> tuple[int, ...]:
    """One seed per pair; n: how many, or the seeds; given: how many pairs have latents given."""
    if seeds is None and isinstance(n, Sequence) and not isinstance(n, str):
        n, seeds = None, n
    if seeds is not None:
        chosen = tuple(require_seed(seed) for seed in seeds)
        if n is not None and n != len(chosen):
            raise SettingsError(f"n is {n} but there are {len(chosen)} seeds: give one of them")
    else:
        if n is None:
            n = given or 1
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SettingsError(f"n must be a positive whole number, got {n!r}")
        chosen = tuple(secrets.randbits(32) for _ in range(n))
    if not chosen:
        raise SettingsError("seeds is empty: nothing to generate")
    if given is not None and given != len(chosen):
        raise SettingsError(f"latents hold {given} pairs, asked for {len(chosen)}")
    return chosen


def batch_of(batch: int | None, max_batch: int, pairs: int) -> int:
    if batch is None:
        return min(max_batch, pairs)
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= max_batch:
        raise SettingsError(
            f"batch must be from 1 to {max_batch} (max_batch of the engine), got {batch!r}"
        )
    return batch


def max_batch_of(max_batch: int | None) -> int | None:
    wrong = isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1
    if max_batch is not None and wrong:
        raise SettingsError(f"max_batch must be a positive whole number, got {max_batch!r}")
    return max_batch


def tensor_of(name: str, value: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """An override as fp32 on the CPU; letters in `shape` stand for any size."""
    fits = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == len(shape)
        and all(
            isinstance(want, str) or want == have
            for want, have in zip(shape, value.shape, strict=True)
        )
    )
    if not fits:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SettingsError(f"{name} must be a floating-point tensor {list(shape)}, got {got}")
    return value.detach().float().cpu()


def check_background(adapter: str | None, trained: bool, given: bool, noise: Tensor | None) -> None:
    """A background exactly where the adapter was trained with one. Raises SettingsError."""
    if given and not trained:
        raise SettingsError(f"adapter {adapter!r} was trained without background: leave it out")
    if trained and not given:
        raise SettingsError(
            f"adapter {adapter!r} was trained with background: pass background=Background(…)"
        )
    if noise is not None and not given:
        raise SettingsError("background_noise needs a background")
