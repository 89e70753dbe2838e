"""Which backend serves each op: the fastest first, and none that was not proved on this device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.ops import proof

# fastest first: `auto` takes the first that serves an op
BACKENDS = ("triton", "native", "xformers", "onednn", "widened", "reference")


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
    # not chosen on its own: whoever multiplies matrices in fp32 convolves in fp32
    convolution: Callable[..., Tensor] = F.conv2d

    @property
    def widened(self) -> bool:
        """Whether bf16 is computed in fp32, for want of instructions."""
        return any(row.backend == "widened" for row in self.table)


NAMES = tuple(field.name for field in fields(Ops) if field.name not in ("table", "convolution"))


def backend_module(name: str) -> ModuleType:
    return importlib.import_module(f"dualdiff_engine.ops.{name}")


def backend_op(backend: str, op: str) -> Callable[..., Tensor]:
    module = backend_module(backend)
    return module.load(op) if hasattr(module, "load") else getattr(module, op)


def serves(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a backend has the op and computes it right on this device; how, or why not."""
    ok, reason = backend_module(backend).supported(op, device, dtype)
    if not ok:
        return False, reason
    verdict = proof.prove(backend_op(backend, op), op, device, dtype)
    return verdict.ok, reason if verdict.ok else verdict.reason


def _choose(op: str, wanted: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """The first backend that serves the op, of all or of the one wanted, else the reference."""
    reasons: list[str] = []
    for name in BACKENDS if wanted == "auto" else (wanted, "reference"):
        module = backend_module(name)
        ok, reason = True, ""
        if wanted == "auto" and hasattr(module, "proven"):
            ok, reason = module.proven(device)
        if ok:
            ok, reason = serves(name, op, device, dtype)
        if ok:
            return Choice(op, name, "; ".join([reason, *reasons]))
        reasons.append(f"not {name}: {reason}")
    raise BackendError(f"no backend runs {op} on {device} in {dtype}: {'; '.join(reasons)}")


def _known(backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise BackendError(f"no backend is called {backend!r}; there are: {known}")
    return backend


def requested(backend: str) -> dict[str, str]:
    """Op -> the backend that a request names for it.

    backend: a name, for all ops, or "op=name,…", which leaves the ops it does not name to `auto`.
    Raises BackendError for a name, or an op, that does not exist.
    """
    if "=" not in backend:
        return dict.fromkeys(NAMES, _known(backend))
    wanted = dict.fromkeys(NAMES, "auto")
    for part in backend.split(","):
        op, _, name = (text.strip() for text in part.partition("="))
        if op not in wanted:
            raise BackendError(f"no op is called {op!r}; there are: {', '.join(NAMES)}")
        wanted[op] = _known(name)
    return wanted


def bind(
    backend: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Ops:
    """Choose a backend for every op; each chosen one has computed it right on this device.

    backend: `auto` (fastest that is supported, with the reason), or a name of `BACKENDS`, which
    serves what ops it has and leaves the others to the reference, or backends of single ops, as in
    "attention=xformers,exchange=reference", with `auto` for the others.
    Raises BackendError, with the reason, when an explicit request cannot be met here.
    """
    wanted, device = requested(backend), torch.device(device)
    table = tuple(_choose(op, name, device, dtype) for op, name in wanted.items())
    missed = [row for row in table if wanted[row.op] not in ("auto", row.backend)]
    by_op = "=" in backend
    if missed and (by_op or len(missed) == len(table)):
        named = f"{missed[0].op}={wanted[missed[0].op]}" if by_op else backend
        # its reason begins with that of the fall-back
        _, _, why = missed[0].reason.partition("; ")
        raise BackendError(f"backend {named!r} cannot be used: {why}")
    bound = {row.op: backend_op(row.backend, row.op) for row in table}
    ops = Ops(**bound, table=table)
    return replace(ops, convolution=_convolution()) if ops.widened else ops


def _convolution() -> Callable[..., Tensor]:
    """In fp32, where it is right. Raises BackendError."""
    widened = backend_op("widened", "convolution")
    verdict = proof.prove(widened, "convolution", torch.device("cpu"), torch.bfloat16)
    if not verdict.ok:
        raise BackendError(f"no backend runs convolutions in bfloat16: {verdict.reason}")
    return widened
