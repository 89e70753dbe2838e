"""`dualdiff-bench ops`: every op call of a denoiser step, on every backend, next to its error.

A speed is reported only next to a green test: the result of the very call that is timed is compared
with fp64, and may lose what plain PyTorch loses in that dtype, or an fp32 sum one term after the
other, plus one rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock, machine
from dualdiff_engine.bench.op import auto
from dualdiff_engine.bench.op.calls import Spec, coupled, trace, work
from dualdiff_engine.bench.op.cases import Problem, problem
from dualdiff_engine.bench.step import measure, report
from dualdiff_engine.bench.step.case import MODELS, SCALE, WHY
from dualdiff_engine.device import device_of, dtype_of, keep_freed_blocks
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.ops import proof

RED = "test red: not reported"
PLAIN = "eager"
OWN = ", own keys"
ROUNDS = {"cuda": clock.ROUNDS, "cpu": 5}
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = (
    "op", "shapes", "calls", "by", "ms p50", "p20–p80", "TFLOP/s", "GB/s", "of ceiling",
    "bound by", "to eager", "error", "of budget",
)  # fmt: skip
LEGEND = """\
eager: the formula in plain PyTorch, neither fused nor folded; F.linear, bmm, sdpa: its kernels
calls: of a guided step; GB/s: bytes that must move, inputs once and the result once
of ceiling: of the copy and product rates measured in this run, whichever takes longer
own keys: the same, with a copy of shared keys and values for every row that was made before
to eager: median over rounds of eager's time over this one's; error: relative L2 to fp64"""

Run = Callable[[], Tensor]


def relative(actual: Tensor, exact: Tensor) -> float:
    return proof.loss(actual, exact).whole


def variants(case: Problem, device: torch.device, dtype: torch.dtype) -> dict[str, Run]:
    """Plain PyTorch, the libraries' kernels and every backend that serves the op here."""
    found: dict[str, Run] = {PLAIN: partial(case.plain, *case.arguments)}
    for name, function in case.libraries.items():
        found[name] = partial(function, *case.arguments)
    for backend in ops.BACKENDS:
        # what fails its proof is a row that says so
        if ops.backend_module(backend).supported(case.spec.op, device, dtype)[0]:
            op = ops.backend_op(backend, case.spec.op)
            found[backend] = partial(op, *case.arguments)
            if case.own:
                found[backend + OWN] = partial(op, *case.own)
    return found


def compiled(case: Problem) -> Run:
    """The plain formula through torch.compile, for these shapes."""
    torch._dynamo.reset()
    return partial(torch.compile(case.plain, fullgraph=True, dynamic=False), *case.arguments)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an op takes and does not write shows as NaN."""
    new_empty = Tensor.new_empty

    def filled(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        return new_empty(self, *shape, **options).fill_(math.nan)

    with mock.patch.object(Tensor, "new_empty", filled):
        yield


reason = proof.first_line


def check(case: Problem, runs: Mapping[str, Run]) -> dict[str, dict[str, Any]]:
    """Each one's error to fp64 on the sampled rows and what it may be, or why it does not run."""
    dtype = next(x.dtype for x in case.arguments if isinstance(x, Tensor))
    exact = case.plain(*case.sample(torch.float64))
    eager = case.plain(*case.sample(dtype))
    budget = proof.budget(eager, exact, proof.terms(case.spec.op, case.arguments)).whole
    checked: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        try:
            with poisoned():
                out = run()
        # whatever a library raises is what this row has to say
        except Exception as error:
            checked[name] = {"status": f"does not run: {reason(error)}"}
            continue
        lost = relative(case.sampled(out), exact)
        green = lost <= budget and out.dtype == eager.dtype
        checked[name] = {"error": lost, "budget": budget, "status": "ok" if green else RED}
    return checked


def rows_of(
    spec: Spec,
    calls: int,
    device: torch.device,
    dtype: torch.dtype,
    ceilings: clock.Ceilings | None,
    *,
    compile: bool = False,
    rounds: int | None = None,
) -> list[dict[str, Any]]:
    """One row per way to compute a call; without ceilings it is checked and not timed."""
    case = problem(spec, device, dtype)
    runs = variants(case, device, dtype)
    if compile:
        runs["torch.compile"] = compiled(case)
    checked = check(case, runs)
    counted = work(spec, dtype)
    seconds: dict[str, list[float]] = {}
    if ceilings is not None:
        green = {name: run for name, run in runs.items() if checked[name]["status"] == "ok"}
        seconds = clock.interleaved(green, device, rounds or ROUNDS[device.type])
    rows = []
    for name, facts in checked.items():
        row = {
            "op": spec.op,
            "shapes": spec.label,
            "calls_per_step": calls,
            "dtype": str(dtype).removeprefix("torch."),
            "by": name,
            **asdict(counted),
            **facts,
        }
        if ceilings is not None and name in seconds:
            row |= _speed(seconds[name], seconds.get(PLAIN), counted.flops, counted.moved, ceilings)
            if name + OWN in seconds:
                row["rate_to_own_keys"] = _ratio(seconds[name + OWN], seconds[name])
        rows.append(row)
    return rows


def _speed(
    seconds: Sequence[float],
    eager: Sequence[float] | None,
    flops: int,
    moved: int,
    ceilings: clock.Ceilings,
) -> dict[str, Any]:
    middle = statistics.median(seconds)
    floor, bound = ceilings.floor_s(flops, moved)
    return {
        "ms": measure.quantiles(seconds),
        "rounds": len(seconds),
        "flops_per_s": flops / middle,
        "bytes_per_s": moved / middle,
        "share_of_ceiling": floor / middle,
        "bound_by": bound,
        "speedup_over_eager": _ratio(eager, seconds) if eager else None,
    }


def _ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """The median over rounds."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))


def run(
    calls: Counter[Spec],
    device: torch.device,
    dtype: torch.dtype,
    *,
    timed: bool = True,
    compile: bool = False,
    rounds: int | None = None,
    each: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> dict[str, Any]:
    """Measure every call; `each` is handed the rows of a call as soon as they are there."""
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        ceilings = clock.ceilings(device, dtype) if timed else None
        for spec, count in calls.items():
            found = rows_of(spec, count, device, dtype, ceilings, compile=compile, rounds=rounds)
            each(found)
            rows += found
    return {"ceilings": asdict(ceilings) if ceilings else None, "rows": rows}


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    facts = [row["op"], row["shapes"], str(row["calls_per_step"]), row["by"]]
    if "ms" not in row:
        why = row["status"] if row["status"] != "ok" else "-"
        facts += [why, *["-"] * 6]
    else:
        ms, ratio = row["ms"], row["speedup_over_eager"]
        facts += [
            f"{ms['p50']:.3f}",
            f"{ms['p20']:.3f}–{ms['p80']:.3f}",
            f"{row['flops_per_s'] / 1e12:.4g}",
            f"{row['bytes_per_s'] / 1e9:.4g}",
            f"{row['share_of_ceiling']:.0%}",
            row["bound_by"],
            f"{ratio:.2f}x" if ratio else "-",
        ]
    if "error" not in row:
        return [*facts, "-", "-"]
    return [*facts, f"{row['error']:.1e}", f"{row['error'] / row['budget']:.0%}"]


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns under each other; the first `left` to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return aligned([COLUMNS, *(cells(row) for row in rows)], left=4)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "dualdiff-bench ops",
        description="Time every op call of a guided denoiser step on every backend, interleaved, "
        "with its error to fp64. Calls, shapes and counts are traced from the network.",
    )
    p.add_argument("--batch", type=int, help="pairs per step (default: 32 on a GPU, else 1)")
    p.add_argument(
        "--model", choices=("demo", "small", "sd15"), help="default: sd15 on a GPU, else demo"
    )
    p.add_argument(
        "--background", action="store_true", help="the calls of a step with a background"
    )
    p.add_argument(
        "--coupled", action="store_true",
        help="the calls of the same sites in a coupling that connects, aligns and merges",
    )  # fmt: skip
    p.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, …")
    p.add_argument("--ops", default=",".join(ops.NAMES), help="only these, with commas")
    p.add_argument("--rounds", type=int, help="timed calls of each (default 21 on a GPU, else 5)")
    p.add_argument(
        "--compile", action=argparse.BooleanOptionalAction,
        help="also torch.compile of the plain formula (default: on a GPU)",
    )  # fmt: skip
    p.add_argument("--tune", type=float, metavar="SECONDS", help="measure auto's choice first")
    p.add_argument("--output-json", type=Path, metavar="FILE", help="keep the record")
    return p


def main(arguments: Sequence[str]) -> None:
    options = parser().parse_args(arguments)
    device = device_of(options.device)
    on_gpu = device.type == "cuda"
    dtype = dtype_of(options.dtype or ("bfloat16" if on_gpu else "float32"), device)
    model = options.model or ("sd15" if on_gpu else "demo")
    pairs = options.batch if options.batch is not None else (32 if on_gpu else 1)
    chosen = [name.strip() for name in options.ops.split(",")]
    if unknown := [name for name in chosen if name not in ops.NAMES]:
        raise SettingsError(f"no op {unknown[0]!r}: choose from {', '.join(ops.NAMES)}")
    if pairs < 1 or (options.rounds is not None and options.rounds < 1):
        raise SettingsError("--batch and --rounds must be at least 1")
    path = options.output_json
    if path is not None and not path.parent.is_dir():
        raise SettingsError(f"no folder {str(path.parent)!r} to write {path.name} to: make it")
    traced = trace(model, pairs, background=options.background)
    if options.coupled:
        traced = coupled(traced, pairs)
    calls = Counter({spec: n for spec, n in traced.items() if spec.op in chosen})
    print(f"preset {model}: {WHY[model]}", flush=True)
    if not on_gpu:
        # as an engine does
        keep_freed_blocks()
    # of the traced network's own calls
    choices = (
        {}
        if options.coupled
        else auto.taken(
            model, pairs, device, dtype, background=options.background, limit_s=options.tune
        )
    )
    found = run(
        calls, device, dtype, rounds=options.rounds,
        compile=on_gpu if options.compile is None else options.compile,
    )  # fmt: skip
    size = MODELS[model]["sample_size"] * SCALE[model]
    case = {"model": model, "batch": pairs, "size": size, "background": options.background}
    case |= {"coupled": True} if options.coupled else {}
    record = {**machine.facts(device), "case": case, **found}
    print(table(record["rows"]), "", LEGEND, "", auto.verdict(record["rows"], choices), sep="\n")
    if path is not None:
        report.write_json(record, path)
