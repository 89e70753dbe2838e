"""The GPU suite runs to its end without a GPU, and a part that goes wrong is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine.bench.gpu import parts as gpu_parts
from dualdiff_engine.bench.gpu import suite as gpu_suite


@pytest.mark.timeout(1200)
def test_every_part_runs_to_its_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--interpret", "--output", str(tmp_path)])
    out = capfd.readouterr().out
    assert stopped.value.code == 0, out
    for name in gpu_suite.NAMES:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert record["finished"]
        assert record["interpreted"]
        assert record["complaints"] == []
        assert f"{name}: ok" in out
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    assert {row["check"] for row in checks} == {"fp64", "opcheck", "fullgraph", "capture", "graphs"}
    classes = json.loads((tmp_path / "autotune.json").read_text())["classes"]
    assert all(len(row["tried"]) >= 1 for row in classes)
    # a figure from a GPU is written only by a GPU
    assert not any('"ms' in path.read_text() for path in tmp_path.glob("*.json"))
    assert not list(tmp_path.glob("sm_*.json"))


def test_a_complaint_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: Any, record: Any) -> Any:
        yield "the result is wrong"

    monkeypatch.setitem(gpu_parts.PARTS, "machine", gpu_parts.Part(wrong, 1, 2))
    assert gpu_suite.run_part("machine", tmp_path, 10, interpreted=True) == 1
    record = json.loads((tmp_path / "machine.json").read_text())
    assert record["complaints"] == ["the result is wrong"]
    lines = gpu_suite.summary(tmp_path, {"machine": "failed (exit 1)"})
    assert "  WRONG the result is wrong" in lines


def test_a_part_that_hangs_is_cut(tmp_path: Path) -> None:
    assert gpu_suite.start_part("checks", tmp_path, 0.1, interpreted=True) == "cut after 0 s"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="finds no NVIDIA GPU here; --interpret"):
        gpu_suite.main(["--output", str(tmp_path / "records")])
