"""Check that a bundle is unchanged and still computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder.artefact import ADAPTERS, read_artefacts
from dualdiff_engine.export.folder.bundle import check_files, intact, read_manifest
from dualdiff_engine.export.folder.folded import PROBE
from dualdiff_engine.export.graph import probe
from dualdiff_engine.export.graph.validate import read_report
from dualdiff_engine.export.trt import engine_file


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
    parity = {}
    with intact(folder):
        graphs, report = read_artefacts(folder), read_report(folder)
        for path in sorted((folder / ADAPTERS).glob(f"*{PROBE}")):
            stem = path.name.removesuffix(PROBE)
            for graph, row in probe.check(folder, stem, graphs, report).items():
                parity[f"{stem}/{graph}"] = row
                _require(row, f"{folder}: {graph} with adapter {stem}")
    return {"files": checked, "engines": len(engines), "parity": parity}


def _require(row: Mapping[str, float], what: str) -> None:
    if not row["error"] <= row["tolerance"]:
        raise BackendError(
            f"{what} differs by {row['error']:.1e} from when it was written, more than "
            f"{row['tolerance']:.1e}: use the version of ONNX Runtime in the report"
        )
