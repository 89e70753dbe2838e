"""Triton's interpreter made right: bf16, and NumPy's strictness about scalars.

Import this before any kernel module.

Triton 3.6 treats bf16 as raw 16-bit integers in `tl.dot` and in arithmetic, truncates when it
converts to it, and calls `range` on one-element arrays, which NumPy 2.4 refuses.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

from dualdiff_engine.ops import proof

# seconds for the small problem that proves an op: interpreted it takes long on a busy machine, and
# a thread that is left behind disturbs the next kernel
proof.LIMIT_S["cpu"] = 300.0

_Handle, _Builder = interpreter.TensorHandle, interpreter.InterpreterBuilder
_dot, _binary = _Builder.create_dot, _Builder.binary_op
_convert, _patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def _widen(x: Any) -> Any:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _narrow(x: Any) -> Any:
    """Round to nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _wide(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _Handle(_widen(handle.data), tl.float32)


def _create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    return _dot(self, _wide(a), _wide(b), d, precision, imprecise)


def _binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
    if left.dtype.scalar != tl.bfloat16 or op in _BITWISE:
        return _binary(self, left, right, op)
    out = op(_widen(left.data), _widen(right.data))
    if out.dtype == bool:
        return _Handle(out, tl.int1)
    return _Handle(_narrow(out), tl.bfloat16)


def _convert_float(x: Any, source: Any, target: Any, mode: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        return _narrow(x)
    if (source, target) == (tl.bfloat16, tl.float32):
        return _widen(x)
    return _convert(x, source, target, mode)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))


_Builder.create_dot = _create_dot
_Builder.binary_op = _binary_op
interpreter._convert_float = _convert_float
interpreter._patch_lang_tensor = _patch_lang_tensor
