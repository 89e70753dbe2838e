"""The ops of the network, each bound once to the backend that serves it.

`bind` is called when an engine is built; what it returns is plain callables, so that nothing is
decided inside the denoising loop.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.ops import onednn, reference

# fastest first: `auto` takes the first that is supported
BACKENDS: dict[str, ModuleType] = {"onednn": onednn, "reference": reference}


class Choice(NamedTuple):
    """One row of the backend table."""

    op: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Ops:
    """The bound ops; signatures and formulas in `dualdiff_engine.ops.reference`."""

    linear: Callable[..., Tensor]
    branch_linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    exchange: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]
    geglu: Callable[..., Tensor]
    guided_step: Callable[..., Tensor]
    table: tuple[Choice, ...]


NAMES = tuple(name for name in Ops.__dataclass_fields__ if name != "table")


def _choose(op: str, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    rejected: list[str] = []
    for name, module in BACKENDS.items():
        if not hasattr(module, op) or wanted not in ("auto", name):
            continue
        if module is reference:
            reason = "; ".join(["plain PyTorch", *rejected])
            return Choice(op, name, reason)
        ok, reason = module.supported(device, dtype)
        if ok:
            return Choice(op, name, reason)
        if wanted == name:
            raise BackendError(f"backend {name!r} cannot run {op!r} here: {reason}")
        rejected.append(f"not {name}: {reason}")
    # a backend need not have every op; what it lacks is the reference's
    return Choice(op, "reference", f"plain PyTorch; {wanted} has no {op} of its own")


def bind(
    backend: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Ops:
    """Choose a backend for every op.

    backend: `auto` (fastest that is supported, with the reason), or a name of `BACKENDS`.
    Raises BackendError, with the reason, when an explicit request cannot be met.
    """
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise BackendError(f"unknown backend {backend!r}; this version has: {known}")
    table = tuple(_choose(op, backend, torch.device(device), dtype) for op in NAMES)
    bound = {row.op: getattr(BACKENDS[row.backend], row.op) for row in table}
    return Ops(**bound, table=table)
