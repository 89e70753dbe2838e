"""What a call of a Triton op would compile, recorded on shapes: no GPU, no memory, no compiler."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import KernelInterface

from dualdiff_engine import ops
from dualdiff_engine.bench.op.calls import META, Spec
from dualdiff_engine.ops.triton import OPS, tuning
from dualdiff_engine.ops.triton.listing import TRITON_TYPES, Compilation
from dualdiff_engine.ops.triton.tuning import Config


@dataclass(frozen=True)
class Launch(Compilation):
    """multiples: integer arguments of which the compiler is told that 16 divides them."""

    multiples: tuple[str, ...] = ()


# (table, shape class, default) -> what to launch with
Pick = Callable[[str, str, Config], Config]
# launch options, not arguments of a kernel
OPTIONS = ("num_warps", "num_stages")


@contextlib.contextmanager
def choosing(pick: Pick) -> Iterator[None]:
    """Launches ask `pick` instead of the shipped tables."""

    def choose(op: str, shape_class: str, default: Config, device: torch.device) -> Config:
        return pick(op, shape_class, default)

    with mock.patch.object(tuning, "choose", choose):
        yield


def arguments_of(spec: Spec, dtype: torch.dtype) -> list[Any]:
    """The call's tensors, without memory."""
    return [
        torch.empty(x, dtype=dtype, device=META) if isinstance(x, tuple) else x
        for x in spec.arguments
    ]


def _implementation(op: str) -> Callable[..., Tensor]:
    """The function under the operator, which on such tensors would only make its result."""
    operator: Any = ops.backend_op("triton", op)
    return operator._init_fn


@contextlib.contextmanager
def _launched(note: Callable[[Any, tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Kernels, compiled or interpreted, are noted with their arguments instead of run."""

    def chosen(kernel: Any, grid: object) -> Callable[..., None]:
        return lambda *given, **named: note(kernel, given, named)

    with mock.patch.object(KernelInterface, "__getitem__", chosen):
        yield


class _Asked(Exception):  # noqa: N818
    """Ends a launch at its question."""


def asked(spec: Spec, dtype: torch.dtype) -> tuple[str, str, Config] | None:
    """The table and the shape class that a call asks for, and its default; None if it does not."""

    def pick(table: str, shape_class: str, default: Config) -> Config:
        raise _Asked(table, shape_class, default)

    try:
        with choosing(pick), _launched(lambda *_: None):
            _implementation(spec.op)(*arguments_of(spec, dtype))
    except _Asked as question:
        return question.args
    return None


def candidates(spec: Spec, dtype: torch.dtype) -> list[Config]:
    """What the op's module holds worth measuring for this call; empty if nothing can be chosen."""
    module: Any = importlib.import_module(f"dualdiff_engine.ops.triton.{OPS[spec.op]}")
    if not hasattr(module, "candidates"):
        return []
    first, second, *rest = spec.arguments
    if spec.op in ("attention", "align"):
        keys = second[1] + sum(x[1] for x in rest[2:3] if spec.op == "attention")
        return module.candidates(first[-1] // rest[1], dtype, keys)
    if spec.op == "group_norm_silu":
        return module.candidates(first[-2] * first[-1], first[1], second)
    if spec.op in ("exchange", "merge"):
        return module.candidates(dtype)
    rows, columns = torch.Size(first[:-1]).numel(), second[-2]
    return module.candidates(rows, columns // 2 if spec.op == "geglu" else columns, dtype)


def compilations(spec: Spec, dtype: torch.dtype, config: Config | None = None) -> list[Launch]:
    """The kernels that a call launches, with a configuration or as it chooses by default.

    Not where kernels are interpreted: nothing is compiled there.
    """
    found: list[Launch] = []

    def note(kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(_launch(kernel, given, named, f"{spec.op} {spec.label}"))

    def pick(table: str, shape_class: str, default: Config) -> Config:
        return config or default

    with choosing(pick), _launched(note):
        _implementation(spec.op)(*arguments_of(spec, dtype))
    return found


def _launch(kernel: Any, given: tuple[Any, ...], named: dict[str, Any], label: str) -> Launch:
    values = dict(zip(kernel.arg_names, given, strict=False))
    values |= {key: value for key, value in named.items() if key not in OPTIONS}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    multiples = []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = f"*{TRITON_TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if special and value % 16 == 0:
                multiples.append(name)
    config = Config({}, named["num_warps"], named["num_stages"])
    dtypes = {kind for kind in signature.values() if kind.startswith("*")}
    multiplies = "BLOCK_K" in constants or "BLOCK_N" in constants
    tensor_cores = multiplies and dtypes != {"*fp32"}
    return Launch(label, kernel, signature, constants, config, tensor_cores, tuple(multiples))


def key(launch: Launch) -> Hashable:
    """Equal for what is compiled once."""
    return (
        launch.kernel.__name__,
        tuple(launch.signature.items()),
        tuple(launch.constants.items()),
        (launch.config.num_warps, launch.config.num_stages),
        launch.multiples,
    )
