"""Everything a GPU is asked about this engine, in one command under nine minutes.

`python -m dualdiff_engine.bench.gpu.suite [--output DIR]` runs each part in a process of its own,
within its share of the time, and leaves one JSON record per part. A part that fails, or is cut,
does not stop the others, but the exit code is 1. `--interpret` runs the same parts with tiny shapes
on a CPU, kernels interpreted: it measures nothing and finds the mistakes that need no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

TOTAL_S = 9 * 60
RESULTS = Path("bench/results/gpu")
# to stop in good order before it is killed
GRACE_S = 5
# limits are a GPU's: an interpreter on a busy machine may take as many times longer
PATIENCE = 10
MODULE = "dualdiff_engine.bench.gpu.suite"
NAMES = ("machine", "checks", "autotune", "ops", "steps", "footprint", "ladder", "compiled")


def run_part(name: str, folder: Path, seconds: float, *, interpreted: bool) -> int:
    """In this process; 1 if anything is wrong."""
    if interpreted:
        # before any kernel is loaded
        import dualdiff_engine.bench.gpu.interpreter  # noqa: F401
    from dualdiff_engine.bench.gpu.parts import PARTS, Record, Setting

    setting = Setting(folder, time.monotonic() + seconds, interpreted)
    record = Record(name, setting)
    complaints = []
    for complaint in PARTS[name].run(setting, record):
        print(f"{name}: {complaint}", flush=True)
        complaints.append(complaint)
    record.data["complaints"] = complaints
    record.data["finished"] = True
    record.save()
    return 1 if complaints else 0


def start_part(name: str, folder: Path, seconds: float, *, interpreted: bool) -> str:
    """In a process of its own, killed with all it started when its time is up -> its status."""
    words = [sys.executable, "-m", MODULE, "--part", name, "--output", str(folder)]
    words += ["--seconds", str(seconds - GRACE_S), *(["--interpret"] if interpreted else [])]
    process = subprocess.Popen(words, start_new_session=True)
    try:
        code = process.wait(timeout=seconds)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(stop, KeyboardInterrupt):
            raise
        return f"cut after {seconds:.0f} s"
    return "ok" if code == 0 else f"failed (exit {code})"


def run_all(folder: Path, *, interpreted: bool, parts: Sequence[str] = NAMES) -> dict[str, str]:
    """Part -> how it ended."""
    from dualdiff_engine.bench.gpu.parts import PARTS

    start, patience = time.monotonic(), PATIENCE if interpreted else 1
    statuses = {}
    for name in parts:
        part, left = PARTS[name], patience * TOTAL_S - (time.monotonic() - start)
        if left < part.least:
            statuses[name] = f"skipped: {left:.0f} s left, it needs {part.least} s"
        else:
            print(f"[{time.monotonic() - start:3.0f} s] {name}", flush=True)
            seconds = min(patience * part.most, left)
            statuses[name] = start_part(name, folder, seconds, interpreted=interpreted)
    return statuses


def summary(folder: Path, statuses: Mapping[str, str]) -> list[str]:
    """What the records say, in a few lines each."""
    lines = []
    for name, status in statuses.items():
        lines.append(f"{name}: {status}")
        path = folder / f"{name}.json"
        if path.is_file():
            record = json.loads(path.read_text("utf-8"))
            lines += [f"  {text}" for text in SUMMARIES[name](record)]
            lines += [f"  {note}" for note in record["notes"]]
            lines += [f"  WRONG {text}" for text in record.get("complaints", ())]
    return lines


def _machine(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [f"{record['device_name']}, commit {record['commit']}, {versions}"]
    for row in record.get("ceilings", ()):
        product, copy = row["flops_per_s"] / 1e12, row["bytes_per_s"] / 1e12
        lines.append(f"{row['dtype']}: products {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    return lines


def _checks(record: Mapping[str, Any]) -> list[str]:
    rows = record.get("checks", [])
    green = sum(row["status"] == "ok" for row in rows)
    elsewhere = sum(row["status"].startswith("not here") for row in rows)
    return [f"{green} of {len(rows) - elsewhere} green, {elsewhere} need a GPU"]


def _autotune(record: Mapping[str, Any]) -> list[str]:
    rows = record.get("classes", [])
    gains = [row["speedup_over_default"] for row in rows if row.get("speedup_over_default")]
    better = sum(gain > 1 for gain in gains)
    lines = [f"{len(rows)} classes, {sum(len(row['tried']) for row in rows)} configurations"]
    if gains:
        lines.append(f"{better} better than the default, the best {max(gains):.2f}x")
    return lines


def _ops(record: Mapping[str, Any]) -> list[str]:
    """ms of a whole step, by op and implementation: only what serves every call of the op."""
    rows = record.get("rows", [])
    by_op: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        took = by_op.setdefault(row["op"], {}).setdefault(row["by"], [])
        took.append(row["calls_per_step"] * row["ms"]["p50"] if "ms" in row else float("nan"))
    lines = []
    for op, found in by_op.items():
        calls = max(len(took) for took in found.values())
        whole = {by: sum(took) for by, took in found.items() if len(took) == calls}
        timed = [f"{by} {ms:.2f}" for by, ms in whole.items() if ms == ms]
        lines.append(f"{op}: {calls} calls" + (f", ms per step: {', '.join(timed)}" * bool(timed)))
    return lines


def _steps(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in record.get("steps", ()):
        kind = "background" if row["background"] else "plain"
        text = f"{row['batch']:3} {kind:10} {row['peer']:27}"
        if "ms_per_step" in row:
            text += f" {row['ms_per_step']['p50']:9.2f} ms/step {row['pairs_per_s']:8.3f} pairs/s"
            text += f" {row['times_first']:6.2f}x the first"
        lines.append(f"{text}  error {row['error_to_wider_reference']:.1e}")
    return lines


def _footprint(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in record.get("batches", ()):
        peak = f", peak {row['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in row else ""
        lines.append(f"{row['batch']} pairs {'fit' if row['fits'] else 'DO NOT FIT'}{peak}")
    for row in record.get("switches", ()):
        took = [f"{k[3:]} {v['p50']:.2f} ms" for k, v in row.items() if k.startswith("ms from")]
        lines.append(f"switch of {row['bytes'] / 2**20:.0f} MiB {', '.join(took)}".rstrip())
    for row in record.get("first_steps", ()):
        if "first_step_s" in row:
            imports, first = row["imports_s"], row["first_step_s"]
            lines.append(f"first step, {row['cache']}: imports {imports:.1f} s, step {first:.1f} s")
    return lines


SUMMARIES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "machine": _machine,
    "checks": _checks,
    "autotune": _autotune,
    "ops": _ops,
    "steps": _steps,
    "footprint": _footprint,
    "ladder": _steps,
    "compiled": _steps,
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(MODULE, description=__doc__)
    p.add_argument(
        "--output",
        type=Path,
        help=f"folder of the records (default {RESULTS}; with --interpret one that is deleted)",
    )
    p.add_argument("--interpret", action="store_true", help="tiny, on a CPU, nothing is timed")
    p.add_argument("--part", choices=NAMES, action="append", help="only these, in this order")
    p.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if options.output is None:
            options.output = RESULTS
            if options.interpret:
                options.output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _run(options)


def _run(options: argparse.Namespace) -> None:
    if options.seconds is not None:
        (name,) = options.part
        seconds, interpreted = options.seconds, options.interpret
        sys.exit(run_part(name, options.output, seconds, interpreted=interpreted))
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not _has_gpu():
        sys.exit("gpu_suite: PyTorch finds no NVIDIA GPU here; --interpret runs it without one")
    options.output.mkdir(parents=True, exist_ok=True)
    statuses = run_all(options.output, interpreted=options.interpret, parts=options.part or NAMES)
    print("", *summary(options.output, statuses), sep="\n")
    sys.exit(any(not s.startswith(("ok", "skipped")) for s in statuses.values()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
