"""TensorRT engines running and refitted: where there is a GPU and a TensorRT, else skipped."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualdiff_engine import BackendError, Engine
from dualdiff_engine.export.graph.write import ExportOptions, export_onnx
from dualdiff_engine.export.trt import api as tensorrt_api
from dualdiff_engine.export.trt.build import BuildOptions, build
from small import NAME, WIDE, small_adapter, small_engine
from support import relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    try:
        tensorrt_api.installed()
    except BackendError as error:
        pytest.skip(str(error))


def inputs(batch: int) -> tuple[Any, ...]:
    draw = torch.Generator().manual_seed(batch)
    latents = torch.randn(2, 1, batch, 4, 16, 16, generator=draw)
    return latents, 321.0, torch.randn(2, 2, 77, 32, generator=draw)


def by_tensorrt(base: Path, folder: Path) -> Engine:
    return Engine.from_pretrained(base, exported=folder, backend="tensorrt", device="cuda")


def allowed(folder: Path) -> float:
    """What eager PyTorch loses in this precision."""
    report = json.loads((folder / "report.json").read_text())
    return next(iter(report["graphs"]["denoiser"]["adapters"].values()))["tolerance"]


def test_refitted_and_built_afresh(
    exported_small: Any, copy_of: Any, tmp_path: Path, record_property: Any
) -> None:
    """An engine is the engine's network; another adapter by refit is another build; and back."""
    base, file = tmp_path / "base", tmp_path / "other.safetensors"
    eager = small_engine(base, WIDE)
    folder = copy_of(exported_small(WIDE, precision="float16"))
    build(folder, BuildOptions(batches=(1, 4), refittable=True))
    save_file(small_adapter(eager, 2), file)
    refitted = by_tensorrt(base, folder)
    first = {n: refitted.predict_noise(*inputs(n)).cpu() for n in (1, 3)}
    for batch, noise in first.items():
        assert relative(noise, eager.predict_noise(*inputs(batch))) <= allowed(folder)

    eager.load_adapter(file)
    export_onnx(eager, tmp_path / "fresh", ExportOptions(precision="float16", batches=(1,)))
    build(tmp_path / "fresh", BuildOptions(batches=(1, 4), refittable=False))
    fresh = by_tensorrt(base, tmp_path / "fresh")
    refitted.load_adapter(file)
    second = refitted.predict_noise(*inputs(3)).cpu()
    expected = fresh.predict_noise(*inputs(3)).cpu()
    assert relative(second, expected) <= allowed(folder) < relative(first[3], expected)

    start = time.perf_counter()
    refitted.set_adapter(NAME)
    record_property("refit_s", time.perf_counter() - start)
    again = refitted.predict_noise(*inputs(3)).cpu()
    assert relative(again, first[3]) <= allowed(folder)
