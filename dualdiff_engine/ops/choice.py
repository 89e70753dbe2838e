"""Which backend serves each op: the fastest first, and none that was not proved on this device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.ops import proof

# Usually fastest first: without measurements `auto` takes the first that serves an op. After the
# reference, which serves all: single kernels of libraries and other forms of ours, taken on request
# or where measured.
BACKENDS = (
    *("triton", "native", "xformers", "onednn", "widened", "reference"),
    *("sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "triton-composed"),
)


class Choice(NamedTuple):
    """One row of the backend table. where: the shape class it holds for; empty: all others."""

    op: str
    backend: str
    reason: str
    where: str = ""

    @property
    def name(self) -> str:
        """As a request writes it: "attention", or "attention@2x256x77x2x32"."""
        return f"{self.op}@{self.where}" if self.where else self.op


@dataclass(frozen=True)
class Ops:
    """The bound ops; signatures and formulas in `dualdiff_engine.ops.reference`."""

    linear: Callable[..., Tensor]
    branch_linear: Callable[..., Tensor]
    attention: Callable[..., Tensor]
    exchange: Callable[..., Tensor]
    merge: Callable[..., Tensor]
    align: Callable[..., Tensor]
    group_norm_silu: Callable[..., Tensor]
    geglu: Callable[..., Tensor]
    guided_step: Callable[..., Tensor]
    table: tuple[Choice, ...]
    # not chosen on its own: whoever multiplies matrices in fp32 convolves in fp32
    convolution: Callable[..., Tensor] = F.conv2d
    # ops that the request left to `auto`
    free: frozenset[str] = frozenset()

    @property
    def recorded(self) -> dict[str, str]:
        """The choice as a recipe holds it, and as `bind` takes it: op, or op@class -> backend."""
        return {row.name: row.backend for row in self.table}

    @property
    def widened(self) -> bool:
        """Whether bf16 is computed in fp32, for want of instructions."""
        return any(row.backend == "widened" for row in self.table)


NAMES = tuple(field.name for field in fields(Ops) if field.default is MISSING)[:-1]

# of couplings other than the released one, whose sites exchange instead
COUPLED = ("merge", "align")


def backend_module(name: str) -> Any:
    """A module of this package, or of "module-kernel" one of its KERNELS."""
    module, _, kernel = name.partition("-")
    loaded = importlib.import_module(f"dualdiff_engine.ops.{module}")
    return loaded.KERNELS[kernel] if kernel else loaded


def backend_op(backend: str, op: str) -> Callable[..., Tensor]:
    module = backend_module(backend)
    bound: Callable[..., Tensor] = (
        module.load(op) if hasattr(module, "load") else getattr(module, op)
    )
    return bound


def serves(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a backend has the op and computes it right on this device; how, or why not."""
    if backend not in BACKENDS:
        return False, "is not a backend of this version"
    module = backend_module(backend)
    ok, reason = module.supported(op, device, dtype)
    if not ok:
        return False, reason
    limit_s = getattr(module, "LIMIT_S", 0.0)
    verdict = proof.prove(backend_op(backend, op), op, device, dtype, limit_s=limit_s)
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


def requested(backend: str | Mapping[str, str]) -> dict[str, str]:
    """Op, or op@class -> the backend that a request names for it; every op is there.

    backend: a name, for all ops; or "op=name,…" or the same as a mapping, which leaves the ops it
    does not name to `auto`. Raises BackendError for a name, or an op, that does not exist.
    """
    if isinstance(backend, str) and "=" not in backend:
        return dict.fromkeys(NAMES, _known(backend))
    wanted = dict.fromkeys(NAMES, "auto")
    if isinstance(backend, str):
        pairs = [part.partition("=")[::2] for part in backend.split(",")]
    else:
        pairs = list(backend.items())
    for place, name in pairs:
        op, at, where = place.strip().partition("@")
        if op not in NAMES:
            raise BackendError(f"no op is called {op!r}; there are: {', '.join(NAMES)}")
        wanted[op + at + where] = _known(name.strip())
    return wanted


def usual(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` takes for an op where nothing was measured: on a GPU the library."""
    return _choose(op, "auto", device, dtype).backend


def bind(
    backend: str | Mapping[str, str] = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Ops:
    """Choose a backend for every op; each chosen one has computed it right on this device.

    backend: `auto` (fastest that is supported, with the reason), or a name of `BACKENDS`, which
    serves what ops it has and leaves the others to the reference, or backends of single ops, as in
    "attention=xformers,exchange=reference", with `auto` for the others; or `Ops.recorded` of
    another run, which may name a shape class: "attention@2x256x77x2x32=native".
    Raises BackendError, with the reason, when an explicit request cannot be met here.
    """
    wanted, device = requested(backend), torch.device(device)
    table = []
    for place, name in wanted.items():
        op, _, where = place.partition("@")
        table.append(_choose(op, name, device, dtype)._replace(where=where))
    missed = [row for row in table if wanted[row.name] not in ("auto", row.backend)]
    by_op = not isinstance(backend, str) or "=" in backend
    if missed and (by_op or len(missed) == len(table)):
        named = f"{missed[0].name}={wanted[missed[0].name]}" if by_op else backend
        # its reason begins with that of the fall-back
        _, _, why = missed[0].reason.partition("; ")
        raise BackendError(f"backend {named!r} cannot be used: {why}")
    bound = {row.op: backend_op(row.backend, row.op) for row in table if not row.where}
    free = frozenset(op for op in NAMES if wanted[op] == "auto")
    ops = Ops(**bound, table=tuple(table), free=free)
    return replace(ops, convolution=_convolution()) if ops.widened else ops


def _convolution() -> Callable[..., Tensor]:
    """In fp32, where it is right. Raises BackendError."""
    widened = backend_op("widened", "convolution")
    verdict = proof.prove(widened, "convolution", torch.device("cpu"), torch.bfloat16)
    if not verdict.ok:
        raise BackendError(f"no backend runs convolutions in bfloat16: {verdict.reason}")
    return widened
