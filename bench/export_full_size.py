"""The full SD-1.5, random weights, exported and validated at 512²: time, memory, errors, files.

`python -m dualdiff_engine.bench.export_full_size` prints the record; --output-json keeps it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.step import random_base
from dualdiff_engine.bench.step.case import RandomWeights, random_adapter
from dualdiff_engine.bench.step.workers import peak_bytes, reset_peak
from dualdiff_engine.device import release_freed_blocks
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import DualDiffError

CPU = torch.device("cpu")
MODEL, SEED = "sd15", 0
NAME = "full"


class Parts:
    """What is being done, part by part: seconds, seconds of CPU time, peak resident bytes."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._name = ""
        self._start = self._worked = 0.0

    def __call__(self, name: str) -> None:
        """The part before is over, this one begins."""
        print(name, file=sys.stderr, flush=True)
        if self._name and name.startswith(f"{self._name}: "):
            # what the export says at a part's end; it counts until the next begins
            return
        self.end()
        # what a part holds is counted, not what the one before has let go
        release_freed_blocks()
        reset_peak(CPU)
        self._name, self._start, self._worked = name, time.perf_counter(), time.process_time()

    def end(self) -> None:
        if self._name:
            self.rows.append(
                {
                    "part": self._name,
                    "seconds": round(time.perf_counter() - self._start, 1),
                    "cpu_seconds": round(time.process_time() - self._worked, 1),
                    "peak_bytes": peak_bytes(CPU),
                }
            )
            self._name = ""

    def totals(self) -> dict[str, Any]:
        return {
            "seconds": round(sum(row["seconds"] for row in self.rows), 1),
            "cpu_seconds": round(sum(row["cpu_seconds"] for row in self.rows), 1),
            "peak_bytes": max(row["peak_bytes"] for row in self.rows),
        }


def run(folder: Path, *, opset: int = 23, rtx_target: str | None = None) -> dict[str, Any]:
    """Export into `folder`, which is empty; returns a record. Raises DualDiffError.

    rtx_target: also write the denoiser in float16, and have TensorRT-RTX build it for this compute
    capability.
    """
    from dualdiff_engine.export.graph.write import ExportOptions, export_onnx

    facts, options, parts = machine.facts(CPU), ExportOptions(opset=opset, batches=(1,)), Parts()
    parts("writing the base model")
    base = random_base.write_base(folder / "base", MODEL, SEED, full=True, dtype=torch.float16)
    parts("loading the engine")
    with (
        torch.inference_mode(),
        Engine.from_pretrained(base, device="cpu", dtype="float32") as engine,
    ):
        adapter = random_adapter(RandomWeights.of(MODEL, SEED), background=False)
        engine.keep_adapter(adapter, NAME)
        del adapter
        report = export_onnx(engine, folder / "float32", options, parts)
        parts.end()
        half = Parts()
        if rtx_target:
            _write_half(engine, folder / "float16", half)
    record = {
        **facts,
        "model": MODEL,
        "pixels": 512,
        "options": asdict(options),
        **parts.totals(),
        "parts": parts.rows,
        "graphs": {name: _graph(about) for name, about in report["graphs"].items()},
        "runtime": report["runtime"],
        # an export is kept only if onnx.checker accepts every graph, by path and in full
        "checker": {row["part"].removeprefix("checking "): "accepted" for row in parts.rows
                    if row["part"].startswith("checking ")},
        "files": _files(folder / "float32"),
    }  # fmt: skip
    if rtx_target:
        record["tensorrt_rtx"] = _build(folder / "float16", rtx_target, half)
    return record


def _graph(about: dict[str, Any]) -> dict[str, Any]:
    (row,) = about["adapters"].values()
    return {"nodes": about["nodes"], "attentions": about["attentions"], **row}


def _files(folder: Path) -> dict[str, int]:
    """Bytes by name."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def _write_half(engine: Engine, folder: Path, parts: Parts) -> None:
    """The denoiser in float16: what TensorRT has fused attention for. It is built, not run.

    The text encoder too, as the adapter is read for both.
    """
    from dualdiff_engine.export.graph.write import Exporter, ExportOptions

    folder.mkdir()
    exporter = Exporter(engine, folder, ExportOptions(precision="float16"), parts)
    exporter.write({"denoiser", "text_encoder"})
    parts.end()


def _build(folder: Path, target: str, parts: Parts) -> dict[str, Any]:
    """What TensorRT-RTX made of the denoiser, or what stopped it."""
    from dualdiff_engine.export.trt.build import BuildOptions, build

    parts("building")
    options = BuildOptions(flavour="tensorrt-rtx", targets=(target,))
    result: dict[str, Any]
    try:
        (built,) = build(folder, options)
        result = asdict(built)
    except DualDiffError as error:
        # what this machine calls its folders is in no record
        result = {"error": str(error).replace(str(folder), folder.name)}
    parts.end()
    totals, files = parts.totals(), _files(folder)
    return {
        "target": target, "precision": "float16", **result, **totals, "parts": parts.rows,
        "files": files,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--opset", type=int, default=23)
    p.add_argument(
        "--tensorrt-rtx", metavar="CAPABILITY",
        help="also build the denoiser in float16, for a compute capability such as 8.9",
    )  # fmt: skip
    p.add_argument(
        "--folder", type=Path, help="where 12 GB fit; by default the system's temporary folder"
    )
    p.add_argument("--output-json", type=Path, metavar="FILE", help="keep the record")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="dualdiff-export-", dir=options.folder) as folder:
            record = run(Path(folder), opset=options.opset, rtx_target=options.tensorrt_rtx)
    except DualDiffError as error:
        sys.exit(f"export_full_size: {error}")
    text = json.dumps(record, indent=1) + "\n"
    print(text)
    if options.output_json:
        options.output_json.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
