"""What the records of the GPU suite say, in a few lines each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def summary(folder: Path, statuses: Mapping[str, str]) -> list[str]:
    """What the records say, in a few lines each."""
    lines = []
    for name, status in statuses.items():
        lines.append(f"{name}: {status}")
        path = folder / f"{name}.json"
        # an older record of a part that did not run now says nothing of this run
        if path.is_file() and not status.startswith("skipped"):
            record = json.loads(path.read_text("utf-8"))
            if "device_name" in record:
                lines += [f"  {text}" for text in SUMMARIES[name](record)]
            lines += [f"  {note}" for note in record["notes"]]
            lines += [f"  WRONG {text}" for text in record.get("complaints", ())]
            lines += [f"  {text}" for text in record.get("stderr", "").strip().splitlines()[-1:]]
    return lines


def _machine(record: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    lines = [f"{record['device_name']}, commit {record['commit']}, {versions}"]
    for row in record.get("ceilings", ()):
        product, copy = row["flops_per_s"] / 1e12, row["bytes_per_s"] / 1e12
        lines.append(f"{row['dtype']}: products {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    return [*lines, f"TF32: {record['tf32']}"]


def _compile(record: Mapping[str, Any]) -> list[str]:
    lines = []
    for row in record.get("compiled", ()):
        took = f" in {row['seconds']:.0f} s" if "seconds" in row else ""
        done, jobs, processes = row["done"], row["jobs"], row["processes"]
        lines.append(f"{done} of {jobs} launches compiled{took}, {processes} processes")
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
    far = len(record.get("left_to_libraries", ()))
    tried = sum(len(row["tried"]) for row in rows)
    lines = [*_compile(record), f"{len(rows)} classes, {tried} configurations"]
    lines += [f"{far} classes left to libraries, which are far ahead"] * bool(far)
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


def _convolutions(record: Mapping[str, Any]) -> list[str]:
    rows = record.get("rows", [])
    timed = [row for row in rows if "ms" in row]
    lines = [f"{len(rows)} shapes"]
    for kind in ("heuristic", "benchmark") if timed else ():
        ms = sum(row["calls_per_step"] * row["ms"][kind]["p50"] for row in timed)
        lines.append(f"{kind}: {ms:.2f} ms per step")
    return lines


def _end_to_end(record: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['pairs']} pairs: {row['step_s']:.3f} s per step, {row['once_s']:.2f} s for text, "
        f"decoding and masks, {row['write_s']:.2f} s for files; ready in {row['ready_s']:.0f} s"
        for row in record.get("runs", ())
        if "step_s" in row
    ]


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
            lines.append(
                f"first step, kernels compiled: imports {imports:.1f} s, step {first:.1f} s"
            )
    return lines


SUMMARIES: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "machine": _machine,
    "compile": _compile,
    "checks": _checks,
    "convolutions": _convolutions,
    "autotune": _autotune,
    "ops": _ops,
    "steps": _steps,
    "peers": _steps,
    "end_to_end": _end_to_end,
    "footprint": _footprint,
    "ladder": _steps,
    "compiled": _steps,
}
