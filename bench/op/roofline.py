"""`dualdiff-bench roofline`: the least time a denoiser step can take, from counted work alone.

Nothing is measured. Every call takes at least its matrix products at a rate of products, its inputs
and result at a rate of bytes, and its exponentials at their own; the largest of the three counts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op.cases import Work, trace, work
from dualdiff_engine.bench.step.case import MODELS, SCALE
from dualdiff_engine.errors import SettingsError

# Of an H200: bf16 products and a copy as measured on one, 16 exponentials per clock and
# multiprocessor at 1.75 GHz as documented.
PRODUCTS, COPY, EXPONENTIALS = 790.0, 4.3, 3.7
COLUMNS = ("op", "calls", "TFLOP", "GB", "1e9 exp", "ms at least", "share", "bound by")
LEGEND = """\
predicted from counted work, nothing is measured: no step is faster than this at these rates
GB: every input read once and every result written once; convolutions are PyTorch's"""


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


class Convolutions(TorchDispatchMode):
    """Counts the work of every convolution that runs under it, on shapes."""

    def __init__(self, element_size: int) -> None:
        super().__init__()
        self.element_size = element_size
        self.found: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default):
            given, weight = args[:2]
            moved = self.element_size * sum(x.numel() for x in (given, weight, out))
            flops = 2 * out.numel() * weight[0].numel()
            self.found.append(Work(flops, moved, 0))
        return out


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
    convolutions = Convolutions(dtype.itemsize)
    traced = trace(model, batch, background=background, watch=convolutions)
    calls = [(spec.op, count, work(spec, dtype)) for spec, count in traced.items()]
    return rows([*calls, *(("convolution", 1, x) for x in convolutions.found)], rates)


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
