"""The full SD-1.5 as ONNX within 24 GiB, and as TensorRT-RTX reads it. Slow: minutes of tracing."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_GIB = 24
# attention sites of SD-1.5: 16 blocks, each with one on itself and one on the text
SITES = 32


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_full_size_exports_and_validates_within_24_gib(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    built = importlib.util.find_spec("tensorrt_rtx") is not None
    target = ["--tensorrt-rtx", "8.9"] if built else []
    module = "dualdiff_engine.bench.export_full_size"
    arguments = ["-m", module, "--folder", tmp_path, "--output-json", out, *target]
    subprocess.run([sys.executable, *map(str, arguments)], check=True)
    record = json.loads(out.read_text())
    peak = record["peak_bytes"] / 2**30
    print(f"\nexport at 512²: {record['seconds']:.0f} s, peak {peak:.1f} GiB")
    assert peak < LIMIT_GIB
    assert record["graphs"].keys() == {"denoiser", "text_encoder", "vae_decoder"}
    assert record["checker"] == dict.fromkeys(record["graphs"], "accepted")
    assert record["graphs"]["denoiser"]["attentions"] == SITES
    for graph in record["graphs"].values():
        assert max(case["error"] for case in graph["cases"]) <= graph["tolerance"]
    # above what one protobuf holds, so beside the graph
    assert record["files"]["network.safetensors"] > 2**31
    assert record["files"]["denoiser.onnx"] < 2**24
    if built:
        rtx = record["tensorrt_rtx"]
        assert rtx.get("error") is None
        assert rtx["attentions"] == SITES
        assert rtx["peak_bytes"] / 2**30 < LIMIT_GIB
