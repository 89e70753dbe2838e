"""`dualdiff make`, `status` and `verify`: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
if not hasattr(os, "fork"):
    pytest.skip("workers of these tests are forked", allow_module_level=True)

from dataset_cases import accepted, stub, tiny_job
from dualdiff_engine.bench.dataset_stub import NAME
from dualdiff_engine.cli.main import main
from dualdiff_engine.dataset import job_file, layout, process
from dualdiff_engine.dataset.make import Maker
from forked import ForkedWorker


@pytest.fixture(autouse=True)
def _stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.subprocess, "Popen", ForkedWorker)
    monkeypatch.setitem(Maker.run.__kwdefaults__, "painter", NAME)


@pytest.fixture
def job(tmp_path: Path) -> str:
    # JSON is YAML
    path = tmp_path / "job.yaml"
    path.write_bytes(job_file.stored(tiny_job(tmp_path / "data")))
    return str(path)


def test_from_plan_to_verified(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    assert main(["make", job, "--dry-run", "--shard", "0/2"]) == 0
    said = capsys.readouterr().out
    assert "p/a: 3 of 3 pairs to draw" in said
    assert "total: 6 pairs" in said
    assert not root.exists()
    assert main(["status", str(root)]) == 2
    assert "holds no dataset" in capsys.readouterr().err
    assert main(["make", job, "--set", "defects.0.pairs=2"]) == 0
    assert "p/a: 2 of 2 pairs, 2 of them new" in capsys.readouterr().out
    assert main(["status", str(root)]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["status", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [defect["wanted"] for defect in found["defects"]] == [2, 6]
    assert main(["verify", str(root)]) == 0
    layout.pictures_of(root, "p/a", 0)["image"].unlink()
    assert main(["verify", str(root)]) == 2
    assert "p/a/000000.0" in capsys.readouterr().err


def test_pairs_set_aside_are_told_by_the_exit_code(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(monkeypatch, black=["p/a/000001.0"])
    assert main(["make", job, "--set", "limits.attempts=1"]) == 3
    said = capsys.readouterr().out
    assert "set aside: black 1" in said
    assert "missing: p/a 1" in said
    # drawn again with another seed, it is a dataset without a gap
    assert main(["make", job, "--quiet"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_go_on(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    root = tmp_path / "data"
    stub(monkeypatch, batch=1, delay=0.2)

    def send() -> None:
        while not (root / layout.PARTS).is_dir() or not accepted(root):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert main(["make", job, "--quiet"]) == code
    thread.join()
    there = accepted(root)
    assert 1 <= len(there) < 12
    stub(monkeypatch)
    assert main(["make", job, "--quiet"]) == 0
    assert set(there) < set(accepted(root))


def test_errors_are_one_line(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {
        "defects.0.adapter=nowhere": "defects[0] (p/a): adapter: no file or folder",
        "defects.0.pictures=none/*.png": "pictures: there are none at",
        "base=nowhere/at/all": "nowhere",
        "gates.area=[p05, null]": "gates.area: p05 needs real masks of p/a",
        "engine.device=abacus": "abacus",
        "good.p=nowhere": "good.p:",
        "engine.allow_pickle=false": "--allow-pickle",
    }
    for change, words in wrong.items():
        assert main(["make", job, "--set", change]) == 2, change
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "data").exists()
    for name in [name for name in sys.modules if name.startswith("dualdiff_engine.dataset")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["make", job]) == 2
    assert "pip install 'dualdiff-engine[dataset]'" in capsys.readouterr().err


def test_a_dataset_is_looked_through_rejected_from_refilled_and_exported(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = tmp_path / "data", tmp_path / "tree"
    assert main(["make", job]) == 0
    before = layout.pictures_of(root, "p/a", 1)["image"].read_bytes()
    assert main(["gallery", str(root)]) == 0
    rows = (root / "gallery" / "rows.js").read_text("ascii")
    assert rows.count('"accepted"') >= 1
    # as the page writes it
    (tmp_path / "rejected.txt").write_text("p/a/000001\n")
    assert main(["make", job, "--reject", str(tmp_path / "rejected.txt")]) == 0
    after = layout.pictures_of(root, "p/a", 1)["image"].read_bytes()
    assert after != before
    assert main(["verify", str(root)]) == 0
    capsys.readouterr()
    assert main(["export-dataset", str(root), "--format", "mvtec", "--out", str(tree)]) == 0
    assert "12 pairs, 0 normal pictures, 1 pairs left out" in capsys.readouterr().out
    exported = {path.read_bytes() for path in (tree / "p/test/a").iterdir()}
    assert len(exported) == 6
    assert after in exported
    assert before not in exported
    assert main(["gallery", str(root), "--product", "p"]) == 2
    assert "leave out --product" in capsys.readouterr().err


def test_a_job_s_formats_follow_its_pairs(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, wanted = tmp_path / "data", ["--set", "formats=[mvtec]"]
    assert main(["make", job, "--set", "formats=[mvtek]"]) == 2
    assert "formats: there is no format 'mvtek'" in capsys.readouterr().err
    assert not root.exists()
    # half of the pairs are another machine's
    assert main(["make", job, *wanted, "--shard", "0/2"]) == 0
    assert not (root / "formats").exists()
    assert main(["make", job, *wanted, "--shard", "1/2"]) == 0
    assert "mvtec: 12 pairs" in capsys.readouterr().out
    tree = root / "formats" / "mvtec" / "p" / "test" / "a"
    before = {path.name: path.read_bytes() for path in tree.iterdir()}
    assert len(before) == 6
    assert main(["make", job, *wanted]) == 0
    assert "mvtec:" not in capsys.readouterr().out
    (tmp_path / "rejected.txt").write_text("p/a/000001\n")
    assert main(["make", job, *wanted, "--reject", str(tmp_path / "rejected.txt")]) == 0
    after = {path.name: path.read_bytes() for path in tree.iterdir()}
    assert after.keys() == before.keys()
    assert len(set(after.values()) - set(before.values())) == 1
    assert not list((root / "formats").glob(".*"))
    assert main(["verify", str(root)]) == 0


def test_verify_takes_bundles_too(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundles' own tests are in tests/export."""
    assert main(["make", job]) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "data"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"sound": 12, "faults": []}
    (tmp_path / "other").mkdir()
    assert main(["verify", str(tmp_path / "other"), "--remove"]) == 2
    assert "--remove is for datasets" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "other")]) == 2
    assert "bundle" in capsys.readouterr().err
