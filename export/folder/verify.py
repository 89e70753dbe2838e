"""Check that a bundle is unchanged and still computes the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder.artefact import ADAPTERS, Artefact, read_artefacts
from dualdiff_engine.export.folder.bundle import check_files, read_manifest
from dualdiff_engine.export.folder.folded import PROBE, read_adapter
from dualdiff_engine.export.graph import probe
from dualdiff_engine.export.graph.validate import REPORT, cpu_session, relative
from dualdiff_engine.export.run.denoiser import ENCODER, WITH_BACKGROUND, initializers
from dualdiff_engine.export.run.onnx_session import Session
from dualdiff_engine.export.trt import engine_file


@torch.inference_mode()
def verify_bundle(folder: str | Path) -> dict[str, Any]:
    """Check every file's hash, then run every adapter's probe with ONNX Runtime on the CPU.

    TensorRT engines are compared with their manifests, not run.

    Args:
        folder: a bundle by `write_bundle`.

    Returns:
        `files` and `engines` (numbers checked) and `parity`: per "adapter/graph" its `error` and
        `tolerance`. Errors are relative L2 against the outputs of the engine's own network when the
        bundle was written.

    Raises:
        BackendError: a file is missing or changed, or an error is above its tolerance; the message
            names it.
    """
    folder = Path(folder)
    checked = check_files(folder, read_manifest(folder), hashes=True)
    engines = engine_file.plans(folder)
    for path in engines:
        engine_file.check_intact(path)
    graphs = read_artefacts(folder)
    report = json.loads((folder / REPORT).read_text("utf-8"))
    parity = {}
    for path in sorted((folder / ADAPTERS).glob(f"*{PROBE}")):
        stem = path.name.removesuffix(PROBE)
        for graph, row in _run_probe(path, graphs, report, stem).items():
            parity[f"{stem}/{graph}"] = row
            if not row["error"] <= row["tolerance"]:
                raise BackendError(
                    f"{folder}: {graph} with adapter {stem} differs by {row['error']:.1e} from "
                    f"when it was written, more than {row['tolerance']:.1e}: use the version of "
                    "ONNX Runtime in the report"
                )
    return {"files": checked, "engines": len(engines), "parity": parity}


def _run_probe(
    path: Path, graphs: Mapping[str, Artefact], report: Mapping[str, Any], stem: str
) -> dict[str, dict[str, float]]:
    _, adapter = read_adapter(path.with_name(f"{stem}.safetensors"), graphs)
    tensors = {**adapter.sites, **adapter.text}
    background = adapter.summary.background
    runners = {}
    for name, artefact in graphs.items():
        if name == ("denoiser" if background else WITH_BACKGROUND):
            continue
        if name == ENCODER and not background:
            continue
        runners[name] = _runner(path.parent.parent / f"{name}.onnx", artefact, tensors)
    rows = {}
    for name, (result, expected) in probe.run(path, runners).items():
        rows[name] = {
            "error": relative(result, expected),
            "tolerance": _tolerance(report, name, stem),
        }
    return rows


def _runner(path: Path, artefact: Artefact, adapter: Mapping[str, Tensor]) -> Session:
    return cpu_session(path, artefact, initializers(adapter, artefact))


def _tolerance(report: Mapping[str, Any], graph: str, stem: str) -> float:
    """As when written; a denoiser that reads the background encoder's shares may add its error."""
    adapters = report["graphs"][graph]["adapters"]
    allowed = float(adapters.get(stem, next(iter(adapters.values())))["tolerance"])
    if graph == WITH_BACKGROUND:
        allowed += float(report["graphs"][ENCODER]["adapters"][stem]["tolerance"])
    return allowed
