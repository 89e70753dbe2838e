"""What an export says while it runs, and what it asks of the disk before it begins."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dualdiff_engine import Engine
from dualdiff_engine.errors import OutputError
from dualdiff_engine.export.folder.folded import PROBE
from dualdiff_engine.export.graph import space
from dualdiff_engine.export.graph.modules import Size
from dualdiff_engine.export.graph.progress import part
from dualdiff_engine.export.graph.write import ExportOptions, export_onnx


def test_a_part_says_its_seconds_and_size(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "file"
    with part(said.append, "writing file", path):
        assert said == ["writing file"]
        path.write_bytes(bytes(3072))
    assert re.fullmatch(r"writing file: \d+\.\d s, 3\.0 KiB", said[1])


def test_a_part_that_failed_is_not_said_to_be_done() -> None:
    said: list[str] = []
    with pytest.raises(ValueError, match="no"), part(said.append, "tracing"):
        raise ValueError("no")
    assert said == ["tracing"]


def test_the_estimate_holds_and_is_close(bundle: Any, dual: Engine) -> None:
    """At least what the files take, and more by no more than what is put aside for names."""
    folder = bundle("dual")
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    own = [path for path in sizes if path.parent.name == "adapters"]
    assert any(path.name.endswith(PROBE) for path in own)
    height, width = (edge // dual.base.pixels_per_latent for edge in dual.base.picture_size)
    size = Size(height, width, False, dual.text_encoder.tokenizer.model_max_length)
    adapter = space.adapter_bytes(dual, torch.float32, size)
    base = space.base_bytes(dual, torch.float32)
    spare = 7 * (4 << 20)
    assert sum(sizes[path] for path in own) <= adapter
    assert sum(sizes.values()) <= base + adapter <= sum(sizes.values()) + spare


def test_a_disk_that_is_too_small_is_refused_before_tracing(
    dual: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10 << 30, 10 << 30, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said: list[str] = []
    with pytest.raises(OutputError, match=r"the export may take .* and 1\.0 MiB are free: free"):
        export_onnx(dual, tmp_path / "out", ExportOptions(), said.append)
    assert said == ["estimating space"]
    assert not any(tmp_path.iterdir())
