"""Datasets by a painter that computes nothing: what is written, resumed, shared and set aside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")

if not hasattr(os, "fork"):
    pytest.skip("workers of these tests are forked", allow_module_level=True)

from dataset_cases import accepted, contents, rows, stub, tiny_job
from dualdiff_engine.bench.dataset_stub import NAME
from dualdiff_engine.dataset import layout, process, status
from dualdiff_engine.dataset.entries import entries
from dualdiff_engine.dataset.make import Made, Maker
from dualdiff_engine.dataset.plan import Shard
from dualdiff_engine.dataset.rows import refresh, union
from dualdiff_engine.dataset.verify import verify
from dualdiff_engine.errors import OutputError, SettingsError
from forked import ForkedWorker


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process.subprocess, "Popen", ForkedWorker)
        yield


POPEN = subprocess.Popen


def make(root: Path, *, shard: str = "0/1", reject: Path | None = None, **changes: Any) -> Made:
    maker = Maker(tiny_job(root, **changes), Shard.parse(shard))
    return maker.run(painter=NAME, reject=reject)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset that nothing disturbed."""
    root = tmp_path_factory.mktemp("whole") / "data"
    made = make(root)
    assert made.accepted == {"p/a": 6, "p/b": 6}
    return root


def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def test_twice_draws_nothing(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    before, files = rows(root), contents(root)
    made = make(root)
    assert not made.outcome.drawn
    assert not made.missing
    assert rows(root) == before
    assert contents(root) == files
    assert len(accepted(root)) == len(set(accepted(root))) == 12
    assert not list((root / layout.PARTIAL).rglob("*"))


def test_shards_at_once_make_the_same(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    made: list[Made] = []
    threads = [
        threading.Thread(target=lambda n=n: made.append(make(root, shard=f"{n}/2")))
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.wanted for one in made] == [{"p/a": 3, "p/b": 3}] * 2
    assert not any(one.missing for one in made)
    assert contents(root) == contents(whole)
    assert accepted(root) == accepted(whole)
    assert verify(root).faults == []


def test_a_pair_that_crashes_and_one_that_hangs(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    stub(monkeypatch, crash=["p/a/000001.0"], hang=["p/b/000004.0"])
    # longer than a worker that draws is silent, though the machine is busy
    made = make(root, limits={"hang": 2.0})
    assert made.accepted == {"p/a": 5, "p/b": 5}
    assert made.killed == 2
    deaths = Counter(row["key"] for row in rows(root) if row["verdict"] == "death")
    assert max(deaths.values()) == 2
    assert {key for key, count in deaths.items() if count == 2} == {"p/a/000001.0", "p/b/000004.0"}
    aside = {
        row["key"]: row["verdict"] for row in rows(root) if row["verdict"] in ("crash", "hang")
    }
    assert aside == {"p/a/000001.0": "crash", "p/b/000004.0": "hang"}
    rest = {name: own for name, own in contents(whole).items() if name in contents(root)}
    assert contents(root) == rest
    assert len(rest) == 30
    found = status.read(root)
    assert [defect.set_aside for defect in found.defects] == [{"crash": 1}, {"hang": 1}]
    # and it stays so: nobody dies over them again
    again = make(root)
    assert again.killed == 2
    assert not again.outcome.deaths


def test_rejected_pairs_are_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    keys = [f"p/a/000002.{attempt}" for attempt in range(2)]
    stub(monkeypatch, black=["p/a/000000.0", *keys])
    made = make(root, limits={"attempts": 2})
    assert made.missing == {"p/a": 1}
    assert made.outcome.rejected == {"black": 3}
    assert "p/a/000000.1" in accepted(root)
    found = Counter(entry.verdict for entry in entries(root))
    assert found == {"accepted": 11, "black": 3}
    assert all(entry.image.is_file() and entry.mask.is_file() for entry in entries(root))
    # more attempts later fill the gap
    stub(monkeypatch)
    assert not make(root, limits={"attempts": 3}).missing


def test_a_pair_that_raises_alone_is_left_out_until_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    stub(monkeypatch, raises=["p/a/000003.0"])
    made = make(root)
    assert made.missing == {"p/a": 1}
    assert "told to raise" in made.outcome.raised["p/a"]
    stub(monkeypatch)
    assert not make(root).missing


def test_what_is_wrong_with_all_pairs_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(monkeypatch, raises=[f"p/a/{n:06d}.0" for n in range(6)])
    with pytest.raises(OutputError, match="p/a: the stub was told to raise"):
        make(tmp_path / "data")


def test_by_hand(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    listed = tmp_path / "rejected.txt"
    listed.write_text("# by hand\np/a/000002\np/b/image/000001.png\np/a/000004.0\np/a/000003.7\n")
    made = make(root, reject=listed)
    assert made.outcome.drawn == {"p/a": 2, "p/b": 1}
    assert not made.missing
    found = {(e.defect, e.number, e.verdict) for e in entries(root)}
    assert {("a", 2, "by_hand"), ("a", 2, "accepted"), ("b", 1, "by_hand")} <= found
    assert len(found) == 15
    assert verify(root).faults == []
    assert status.read(root).defects[0].set_aside == {"by_hand": 2}
    # the same list again names pairs that are gone, or their successors
    listed.write_text("p/z/000002\n")
    with pytest.raises(SettingsError, match="line 1: 'p/z/000002' is no pair of the job"):
        make(root, reject=listed)


def test_another_job_is_refused(whole: Path) -> None:
    with pytest.raises(OutputError, match=r"drawn otherwise \(other seed\)"):
        make(whole, seed=1)
    with pytest.raises(OutputError, match=r"other sampling"):
        make(whole, sampling={"steps": 3, "size": 64})


def test_more_pairs_keep_those_that_are_there(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    made = make(root, pairs=8)
    assert made.outcome.drawn == {"p/a": 2, "p/b": 2}
    assert contents(whole).items() <= contents(root).items()


def test_damage_is_found_and_mended(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    picture = layout.pictures_of(root, "p/a", 3)["mask"]
    picture.write_bytes(b"x")
    (root / layout.STORE / "p" / "a" / "image" / "000099.png").write_bytes(b"x")
    faults = verify(root, remove=True).faults
    assert faults[0] == "p/a/000003.0: its pictures are gone or damaged"
    assert faults[1].endswith("000099.png: no row lists it")
    assert make(root).outcome.drawn == {"p/a": 1}
    assert contents(whole).items() <= contents(root).items()


def test_folders_that_cannot_be_used(whole: Path, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds thesis\.tex and no dataset"):
        make(stranger)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    linked = copied(whole, tmp_path)
    shutil.rmtree(linked / layout.STORE)
    (linked / layout.STORE).symlink_to(elsewhere)
    with pytest.raises(OutputError, match="symbolic link"):
        make(linked)
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    part = next((damaged / layout.PARTS).iterdir())
    part.write_bytes(b"nonsense\n" + part.read_bytes())
    with pytest.raises(OutputError, match="damaged"):
        make(damaged)


def test_a_torn_last_line_is_left_out(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    part = next((root / layout.PARTS).iterdir())
    part.write_bytes(part.read_bytes()[:-20])
    assert sum(make(root).outcome.drawn.values()) == 1
    assert contents(root) == contents(whole)


def test_what_was_read_is_not_read_again(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    part = max((root / layout.PARTS).iterdir(), key=lambda path: path.stat().st_size)
    lines = part.read_bytes().splitlines(keepends=True)
    # a row is being written
    part.write_bytes(b"".join(lines[:-1]) + lines[-1][:-5])
    state = union(root)
    assert state.sizes[part.name] == len(b"".join(lines[:-1]))
    # nobody can read these rows again, nor needs to
    torn = b"x" * (len(lines[0]) - 1) + b"\n"
    part.write_bytes(torn + b"".join(lines[1:]))
    refresh(root, state)
    part.write_bytes(b"".join(lines))
    fresh = union(root)
    assert (state.accepted, state.rejected, state.tally()) == (
        fresh.accepted, fresh.rejected, fresh.tally()
    )  # fmt: skip
    refresh(root, state)
    assert state.tally() == fresh.tally()


def test_deaths_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    stub(monkeypatch, crash=["p/a/000002.0"])
    maker = Maker(tiny_job(root))
    maker.run(painter=NAME)
    assert maker.state.deaths == union(root).deaths
    # it took neighbours of its batch along
    assert maker.state.deaths["p/a/000002.0"] == 2


def test_no_room_and_no_permission(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="1000 bytes are free"):
        make(tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    # the account of these tests may be allowed everything
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="make this one writable"):
        make(tmp_path / "data")


def test_an_older_run_is_fenced(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    maker = Maker(tiny_job(root, pairs=8))

    def overtake(*_: Any) -> None:
        layout.set_fence(root, "newer-d", "0-of-1", "newer", whole=True)

    before = contents(root)
    with pytest.raises(OutputError, match="a newer run of this job"):
        maker.run(painter=NAME, started=overtake)
    assert contents(root) == before


def test_status_is_read_without_pytorch_and_rows(whole: Path) -> None:
    code = (
        "import sys, json; from pathlib import Path\n"
        "from dualdiff_engine.dataset import status\n"
        "found = status.read(Path(sys.argv[1]))\n"
        "assert 'torch' not in sys.modules\n"
        "print(json.dumps(found.record()))"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", POPEN)
        run = subprocess.run(
            [sys.executable, "-c", code, str(whole)], capture_output=True, text=True, check=True
        )
    found = json.loads(run.stdout)
    assert [d["accepted"] for d in found["defects"]] == [6, 6]
    assert found["left"] == 0
    assert {worker["state"] for worker in found["workers"]} == {"ended"}


def test_a_worker_is_a_process_of_its_own(tmp_path: Path) -> None:
    told = {"root": str(tmp_path), "run": "r", "writer": "r-0", "shard": "0-of-1"}
    told |= {"device": "cpu", "painter": NAME}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", POPEN)
        run = subprocess.run(
            [sys.executable, "-m", "dualdiff_engine.dataset.worker", json.dumps(told)],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    assert run.returncode == 1
    assert "is not a job" in json.loads(run.stdout)["fatal"]
