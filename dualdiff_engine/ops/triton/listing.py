"""Ahead-of-time compilations: a kernel with everything the compiler must know, no GPU needed.

The module of an op states its kernel and its problem shapes in `compilations`; the types of the
kernel's arguments follow from their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualdiff_engine.ops.triton.tuning import Config

TRITON_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
HALVES = (torch.float16, torch.bfloat16)
# run-time scalars that are no integers
FLOATS = frozenset({"eps", "guidance", "scale", "strength", "factor", "flat"})


@dataclass(frozen=True)
class Compilation:
    """One kernel with everything the compiler must know.

    name: "op dtype shapes"; the configuration is not in it. signature: argument -> Triton type
    ("*fp16", "i32", "fp32"), "constexpr" for those in `constants`, in the kernel's order.
    tensor_cores: whether it must use them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    config: Config
    tensor_cores: bool


def compilation(
    op: str,
    shapes: str,
    kernel: Any,
    dtype: torch.dtype,
    config: Config,
    constants: Mapping[str, Any],
    *,
    types: Mapping[str, str] | None = None,
    tensor_cores: bool = True,
) -> Compilation:
    """A kernel for tensors of `dtype`, at the shapes that `constants` hold.

    constants: argument -> compile-time value, None for a tensor that is not given; the blocks of
    `config` join them. types: of arguments whose type does not follow from the name: `*_ptr` is a
    pointer to `dtype`, FLOATS are fp32, all else i32. tensor_cores: False for kernels without a
    product; fp32 never uses them.
    """
    constants = {**constants, **config.blocks}
    given = {**(types or {}), **dict.fromkeys(constants, "constexpr")}
    signature = {name: given.get(name, _type(name, dtype)) for name in kernel.arg_names}
    return Compilation(
        name=f"{op} {TRITON_TYPES[dtype]} {shapes}".rstrip(),
        kernel=kernel,
        signature=signature,
        constants=constants,
        config=config,
        tensor_cores=tensor_cores and dtype != torch.float32,
    )


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument.endswith("_ptr"):
        return f"*{TRITON_TYPES[dtype]}"
    return "fp32" if argument in FLOATS else "i32"


def configs(default: Config, candidates: Sequence[Config], every_candidate: bool) -> list[Config]:
    """The default alone, or with every candidate that tuning may choose in its place."""
    listed = [default]
    for config in candidates if every_candidate else ():
        if config not in listed:
            listed.append(config)
    return listed
