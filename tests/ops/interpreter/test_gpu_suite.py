"""The GPU suite runs to its end without a GPU, and a part that goes wrong is told."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine.bench.gpu import parts as gpu_parts
from dualdiff_engine.bench.gpu import plan
from dualdiff_engine.bench.gpu import suite as gpu_suite
from dualdiff_engine.bench.gpu.summary import summary

MISSING = "needs diffusers"


def hide(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every process that is started."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{package!r}] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.timeout(1200)
def test_every_part_runs_to_its_end_without_diffusers(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    hide("diffusers", tmp_path_factory.mktemp("hidden"), monkeypatch)
    monkeypatch.setenv("DUALDIFF_COMMIT", "abc1234")
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(["--interpret", "--output", str(tmp_path)])
    out = capfd.readouterr().out
    assert stopped.value.code == 0, out
    records = {}
    with tarfile.open(tmp_path / gpu_suite.ARCHIVE) as archive:
        for name in plan.of_call(None):
            member = archive.extractfile(f"{name}.json")
            assert member is not None
            records[name] = record = json.load(member)
            assert record["finished"]
            assert record["interpreted"]
            assert record["complaints"] == []
            assert record["status"] == "ok"
            assert record["commit"] == "abc1234"
            assert record["tf32"]["float32_matmul_precision"]
            assert f"{name}: ok" in out
    kinds = {row["check"] for row in records["checks"]["checks"]}
    assert kinds == {"fp64", "opcheck", "fullgraph", "capture", "graphs"}
    assert records["compile"]["compiled"][0]["done"] == gpu_parts.FEW
    assert records["convolutions"]["rows"]
    assert all(len(row["tried"]) >= 1 for row in records["autotune"]["classes"])
    # what cannot run says what is missing
    missing = {name for name, record in records.items() if MISSING in str(record["notes"])}
    assert missing == {"peers", "end_to_end"}
    # a figure from a GPU is written only by a GPU
    assert not any('"ms' in path.read_text() for path in tmp_path.glob("*.json"))
    assert not list(tmp_path.glob("sm_*.json"))


@pytest.mark.timeout(600)
def test_pairs_are_drawn_to_files(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu_suite.start_part("end_to_end", tmp_path, 500, True) == "ok", capfd.readouterr().err
    record = json.loads((tmp_path / "end_to_end.json").read_text())
    assert record["runs"] == [{"pairs": 1, "graphs": False}]
    assert MISSING not in str(record["notes"])


def test_a_complaint_is_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(setting: Any, record: Any) -> Any:
        yield "the result is wrong"

    monkeypatch.setitem(gpu_parts.RUNS, "machine", wrong)
    assert gpu_suite.run_part("machine", tmp_path, 10, True) == 1
    record = json.loads((tmp_path / "machine.json").read_text())
    assert record["complaints"] == ["the result is wrong"]
    lines = summary(tmp_path, {"machine": "failed (exit 1)"})
    assert "  WRONG the result is wrong" in lines


def test_a_part_that_dies_leaves_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    records.mkdir()
    hide("triton", tmp_path, monkeypatch)
    assert gpu_suite.start_part("ops", records, 100, True) == "failed (exit 1)"
    record = json.loads((records / "ops.json").read_text())
    assert record["status"] == "failed (exit 1)"
    assert "ModuleNotFoundError" in record["stderr"]
    assert "ModuleNotFoundError" in summary(records, {"ops": "failed (exit 1)"})[-1]
    assert [path.name for path in records.iterdir()] == ["ops.json"]


def test_a_part_that_hangs_is_cut(tmp_path: Path) -> None:
    assert gpu_suite.start_part("checks", tmp_path, 0.1, True) == "cut after 0 s"
    assert json.loads((tmp_path / "checks.json").read_text())["status"] == "cut after 0 s"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="finds no NVIDIA GPU here; --interpret"):
        gpu_suite.main(["--output", str(tmp_path / "records")])
