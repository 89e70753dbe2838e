"""Exported networks as peers of dualdiff-bench, beside the released computation in one run."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from dualdiff_engine.bench.step import exported, measure, peers, report
from dualdiff_engine.bench.step.case import Case
from dualdiff_engine.bench.step.workers import Entry
from dualdiff_engine.errors import DualDiffError

ENTRIES = [Entry("released", "float32"), Entry("engine-onnxruntime", "float32")]


def tiny(*, background: bool) -> Case:
    return Case("tiny", 2, 10, 4, 4, 2.5, background, 0)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "background", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "background"]
)
def test_onnxruntime_in_the_run_of_the_others(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said: list[str] = []
    case = tiny(background=background)
    record = measure.run(case, ENTRIES, device="cpu", rounds=1, say=said.append)
    released, ours = record["peers"]
    assert ours["error_to_released"] <= 1e-5
    assert ours["speedup_over_released"] > 0
    # the network that was exported is the engine's, and is counted as that
    assert ours["flops_per_step"] == measure.count_flops(case, "engine")
    assert released["prepared_s"] == {}
    assert ours["prepared_s"].keys() == {"base", "export"}
    # tracing takes seconds, loading does not hold it
    assert ours["load_s"] < ours["prepared_s"]["export"]
    assert said[0] == "exporting for engine-onnxruntime float32"
    (line,) = report.preparations(record)
    assert line.startswith("before engine-onnxruntime float32, not in its times: base")
    assert "engine-onnxruntime" in report.text_table(record)
    # gigabytes, for the full network
    assert not list(tmp_path.glob("dualdiff-bench-*"))


def test_the_peer_is_what_users_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by `Engine.from_pretrained` with the folders, backend, precision and batch."""
    asked = {}

    def from_pretrained(base: Path, **options: object) -> None:
        asked.update(options, base=base)
        raise DualDiffError("asked")

    monkeypatch.setattr("dualdiff_engine.engine.Engine.from_pretrained", from_pretrained)
    cuda = torch.device("cuda")
    monkeypatch.setattr(Case, "inputs", lambda self, device: {})
    with pytest.raises(DualDiffError, match="asked"):
        peers.PEERS["engine-tensorrt"](tiny(background=False), cuda, torch.float16, Path("f"))
    assert asked == {
        "base": Path("f", "base"),
        "exported": Path("f", "graphs"),
        "backend": "tensorrt",
        "device": cuda,
        "dtype": torch.float16,
        "max_batch": 2,
    }


def test_an_export_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "own").write_text("", "utf-8")
    with pytest.raises(DualDiffError, match="exists and is not empty"):
        exported.prepare(tiny(background=False), "float32", "onnxruntime", tmp_path)
