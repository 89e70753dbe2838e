"""`dualdiff-bench roofline`: the least time a denoiser step can take, from counted work alone.

Nothing is measured. Every call takes at least its matrix products at a rate of products, its inputs
and result at a rate of bytes, and its exponentials at their own; the largest of the three counts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op.calls import Work, trace, work
from dualdiff_engine.bench.step.case import MODELS, SCALE
from dualdiff_engine.errors import SettingsError

# Of an H200: bf16 products and a copy as measured on one, 16 exponentials per clock and
# multiprocessor at 1.75 GHz as documented.
DEFAULT_RATES = PRODUCTS, COPY, EXPONENTIALS = 790.0, 4.3, 3.7
COLUMNS = ("op", "calls", "TFLOP", "GB", "1e9 exp", "ms at least", "share", "bound by")
LEGEND = """\
predicted from counted work, nothing is measured: no step of these calls is faster at these rates
GB: every input read once, every result written once; names with a space, convolution, upsampling,
concatenation and copy are PyTorch's work between the ops"""
aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d, aten.convolution)
# takes memory, or looks at it, and moves nothing
FREE = (aten.empty, aten.new_empty, aten.empty_like, aten.detach, aten.zeros)
# what PyTorch runs between the ops, by what it is there for
NAMES_BETWEEN = {
    **dict.fromkeys((aten.layer_norm, aten.native_layer_norm), "layer norm"),
    **dict.fromkeys((aten.group_norm, aten.native_group_norm), "group norm"),
    aten.add_: "residual add",
    aten.cat: "concatenation",
    aten.upsample_nearest2d: "upsampling",
    # rows of a pair that part, and results made contiguous
    **dict.fromkeys(
        (aten.clone, aten.copy_, aten._to_copy, aten.contiguous, aten.flatten, aten.reshape), "copy"
    ),
}


@dataclass(frozen=True)
class Rates:
    """Per second: FLOPs of matrix products, bytes, exponentials."""

    products: float
    copy: float
    exponentials: float

    def floor(self, counted: Work) -> tuple[float, str]:
        """Seconds, and what they are bound by."""
        return max(
            (counted.flops / self.products, "products"),
            (counted.moved / self.copy, "bytes"),
            (counted.exps / self.exponentials, "exponentials"),
        )


@dataclass(frozen=True)
class Convolution:
    """A convolution of the network: shapes of its maps and weight, stride and padding."""

    input: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]


class Surroundings(TorchDispatchMode):
    """Counts, on shapes, the work of everything between the ops that runs under it.

    found: (name, work) of each call. convolutions: how often each is called. Inputs that repeat a
    row in memory are read once; what only makes a view, or takes memory, moves nothing.
    """

    def __init__(self, element_size: int) -> None:
        super().__init__()
        self.element_size = element_size
        self.found: list[tuple[str, Work]] = []
        self.convolutions: Counter[Convolution] = Counter()
        self._inside_op = False

    @contextlib.contextmanager
    def inside_op(self) -> Iterator[None]:
        """What runs here is part of an op, whose work is counted as a whole."""
        self._inside_op = True
        try:
            yield
        finally:
            self._inside_op = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # norms also return their statistics, a few numbers per row
        result = out[0] if isinstance(out, (tuple, list)) else out
        if self._inside_op or func.overloadpacket in FREE or _view(func, args, result):
            return out
        if func.overloadpacket in CONVOLUTIONS:
            self._convolution(out, *args)
            return out
        moved = sum(_elements(x) for x in (*pytree.tree_leaves(args), result))
        name = NAMES_BETWEEN.get(func.overloadpacket, str(func.overloadpacket))
        self._count(name, 0, moved)
        return out

    def _convolution(
        self,
        out: Tensor,
        given: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        *_: object,
    ) -> None:
        shapes = (given.shape, weight.shape, stride, padding)
        self.convolutions[Convolution(*map(tuple, shapes))] += 1
        moved = sum(map(_elements, (given, weight, out)))
        self._count("convolution", 2 * out.numel() * weight[0].numel(), moved)
        if bias is not None:
            # PyTorch adds it in a pass of its own after cuDNN
            self._count("convolution bias", 0, 2 * out.numel() + bias.numel())

    def _count(self, name: str, flops: int, elements: int) -> None:
        self.found.append((name, Work(flops, self.element_size * elements, 0)))


def _view(func: Any, args: tuple[Any, ...], result: object) -> bool:
    """Whether the result is memory of an argument that was not written to."""
    if func._schema.is_mutable or not isinstance(result, Tensor):
        return False
    made = StorageWeakRef(result.untyped_storage())
    given = [x for x in pytree.tree_leaves(args) if isinstance(x, Tensor)]
    return any(StorageWeakRef(x.untyped_storage()) == made for x in given)


def _elements(x: object) -> int:
    """That differ in memory."""
    if not isinstance(x, Tensor):
        return 0
    return math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)


def rows(calls: Iterable[tuple[str, int, Work]], rates: Rates) -> list[dict[str, Any]]:
    """One row per op from (op, calls, work of one), the longest first."""
    found: dict[str, dict[str, Any]] = {}
    bound: dict[str, Counter[str]] = {}
    for op, count, counted in calls:
        seconds, by = rates.floor(counted)
        row = found.setdefault(
            op, {"op": op, "calls": 0, "flops": 0, "moved": 0, "exps": 0, "seconds": 0.0}
        )
        for name, value in (("calls", 1), ("seconds", seconds), *vars(counted).items()):
            row[name] += count * value
        bound.setdefault(op, Counter())[by] += count * seconds  # type: ignore[assignment]
    for op, row in found.items():
        row["bound_by"] = max(bound[op], key=lambda by: bound[op][by])
    return sorted(found.values(), key=lambda row: -row["seconds"])


def step(
    model: str, batch: int, *, background: bool, dtype: torch.dtype, rates: Rates
) -> list[dict[str, Any]]:
    """The rows of a guided denoiser step of `batch` pairs."""
    between = Surroundings(dtype.itemsize)
    traced = trace(model, batch, background=background, watch=between)
    calls = [(spec.op, count, work(spec, dtype)) for spec, count in traced.items()]
    return rows([*calls, *((name, 1, counted) for name, counted in between.found)], rates)


def table(found: Sequence[dict[str, Any]]) -> str:
    total = sum(row["seconds"] for row in found)
    lines = [
        [
            row["op"],
            str(row["calls"]),
            f"{row['flops'] / 1e12:.3f}",
            f"{row['moved'] / 1e9:.3f}",
            f"{row['exps'] / 1e9:.2f}",
            f"{row['seconds'] * 1e3:.3f}",
            f"{row['seconds'] / total:.0%}",
            row["bound_by"],
        ]
        for row in found
    ]
    sums = [sum(row[name] for row in found) for name in ("calls", "flops", "moved", "exps")]
    whole = [
        "step", str(sums[0]), f"{sums[1] / 1e12:.3f}", f"{sums[2] / 1e9:.3f}",
        f"{sums[3] / 1e9:.2f}", f"{total * 1e3:.3f}", "100%", "",
    ]  # fmt: skip
    return op_bench.aligned([COLUMNS, *lines, whole], left=1)


def main(arguments: Sequence[str]) -> None:
    p = argparse.ArgumentParser(
        "dualdiff-bench roofline", description=__doc__.partition("\n")[0].partition(": ")[2]
    )
    p.add_argument("--batch", type=int, default=32, help="pairs per step (default 32)")
    p.add_argument("--model", choices=("demo", "small", "sd15"), default="sd15")
    p.add_argument("--background", action="store_true", help="with its shares kept")
    p.add_argument("--dtype", choices=op_bench.DTYPES, default="bfloat16")
    p.add_argument("--products", type=float, default=PRODUCTS, help=f"TFLOP/s ({PRODUCTS:g})")
    p.add_argument("--copy", type=float, default=COPY, help=f"TB/s ({COPY:g})")
    p.add_argument(
        "--exponentials", type=float, default=EXPONENTIALS, help=f"1e12/s ({EXPONENTIALS:g})"
    )
    o = p.parse_args(arguments)
    if o.batch < 1 or min(o.products, o.copy, o.exponentials) <= 0:
        raise SettingsError("--batch must be at least 1, and every rate above 0")
    rates = Rates(*(1e12 * rate for rate in (o.products, o.copy, o.exponentials)))
    dtype = getattr(torch, o.dtype)
    found = step(o.model, o.batch, background=o.background, dtype=dtype, rates=rates)
    kind = "with background" if o.background else "plain"
    side = MODELS[o.model]["sample_size"] * SCALE[o.model]
    print(
        f"{o.model}, {o.batch} pairs, {side} px, {kind}, {o.dtype}, at {o.products:g} TFLOP/s, "
        f"{o.copy:g} TB/s and {o.exponentials:g}e12 exponentials/s"
    )
    print(table(found), "", LEGEND, sep="\n")
