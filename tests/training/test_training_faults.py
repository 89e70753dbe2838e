"""What goes wrong around a checkpoint: kills, damaged states, and numbers that are not finite."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualdiff_engine import files
from dualdiff_engine.adapters import files as adapter_files
from dualdiff_engine.errors import AdapterError, DualDiffError, OutputError, TrainingError
from dualdiff_engine.pipeline import faults
from dualdiff_engine.training import TrainingResult, state, train_adapter
from dualdiff_engine.training.state import CHECKSUM, HEADER, RUN, STATE
from dualdiff_engine.training.trainer import ADAPTER, LOCK, _Run
from training_cases import DEFECT, SIZE, base_of, options_of, write_data

# a state and a sheet at step 2, a state at step 3, then what ends a run
OPTIONS: dict[str, Any] = {
    "steps": 3,
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
    "sample_every": 2,
    "samples": 1,
    "sample_steps": 1,
}
SHEET = Path("checkpoint-2", "sheet.png")


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    """Unlike elsewhere, gradients are wanted."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def train(data: Path, out: Path, **changes: Any) -> TrainingResult:
    return train_adapter(base_of(False), data, out, options_of(**{**OPTIONS, **changes}))


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# --- kills ------------------------------------------------------------------------------------


class Disk:
    """Watches what a run does to its folder, and keeps what a kill at each moment would leave."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.seen: dict[tuple[tuple[str, bytes], ...], Path] = {}
        self.calls: list[tuple[str, str]] = []

    def keep(self) -> None:
        content = tuple(content_of(self.folder).items())
        if content not in self.seen:
            self.seen[content] = self.copies / f"{len(self.seen):03d}"
            shutil.copytree(self.folder, self.seen[content])

    def around(self, name: str, call: Callable[..., Any], at: int = 0) -> Callable[..., Any]:
        """`call`, noted; `at`: which argument is the path. A write is kept when half of it is done.

        Before a write the folder is as after the replacement before.
        """

        def watched(*given: Any, **options: Any) -> Any:
            path = Path(given[at])
            if not path.is_relative_to(self.folder):
                return call(*given, **options)
            self.calls.append((name, str(path.relative_to(self.folder))))
            result = call(*given, **options)
            if name == "write":
                whole = path.read_bytes()
                path.write_bytes(whole[: len(whole) // 2])
                self.keep()
                path.write_bytes(whole)
            elif name == "replace":
                self.keep()
            return result

        return watched


@pytest.fixture(scope="module")
def watched(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Disk:
    """A whole run."""
    out = tmp_path_factory.mktemp("undisturbed")
    disk = Disk(out, tmp_path_factory.mktemp("copies"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", disk.around("sync", files.sync))
        for room in (state, adapter_files):
            patch.setattr(room, "save_file", disk.around("write", save_file, 1))
        write = files.write_whole

        def write_whole(path: Path, content: bytes) -> None:
            with files.written_whole(path) as partial:
                disk.around("write", Path.write_bytes)(partial, content)

        from dualdiff_engine.training import record

        assert record.write_whole is write
        patch.setattr(record, "write_whole", write_whole)
        patch.setattr(Path, "replace", disk.around("replace", Path.replace))
        train(data, out)
    return disk


def scratch(name: str) -> str:
    """Where a file is written before it gets its name."""
    return f"{name}.partial/{Path(name).name}"


def test_files_of_a_step_are_on_the_disk_before_its_state(watched: Disk) -> None:
    """A state may only be there when everything that is older is, even if the machine stops."""
    calls = watched.calls
    state_there = calls.index(("replace", scratch(STATE)))
    for name in (f"checkpoint-2/{ADAPTER}", str(SHEET), "loss.png"):
        there = calls.index(("replace", scratch(name)))
        assert calls[there - 1] == ("sync", scratch(name))
        assert calls[there + 1] == ("sync", str(Path(name).parent))
        assert there < state_there
    # the new folder's own name, too
    assert ("sync", ".") in calls[: calls.index(("replace", scratch(str(SHEET))))]


def test_a_kill_at_any_moment_loses_nothing(data: Path, watched: Disk) -> None:
    """Every different folder that a kill can leave is resumed to the undisturbed one."""
    expected = content_of(watched.folder)
    assert set(expected) == {
        *(ADAPTER, STATE, LOCK, "loss.png", "training.json", str(SHEET)),
        f"checkpoint-2/{ADAPTER}",
    }
    # 8 files: half of each, and each
    assert len(watched.seen) == 16
    for folder in watched.seen.values():
        left = sorted(content_of(folder))
        train(data, folder)
        resumed = content_of(folder)
        differing = [n for n in expected | resumed if expected.get(n) != resumed.get(n)]
        assert not differing, f"killed with {left}: {differing}"


def test_kill_minus_nine(data: Path, watched: Disk, tmp_path: Path) -> None:
    """A real one, most likely while the sheet is drawn."""
    arguments = [
        *("train", "--base", str(base_of(False)), "--data", str(data), "--defect", DEFECT),
        *("--out", str(tmp_path), "--size", str(SIZE), "--rank", "4", "--blend-width", "12"),
        *("--batch", "2", "--steps", "3", "--learning-rate", "1e-3", "--checkpoint-every", "2"),
        *("--sample-every", "2", "--samples", "1", "--sample-steps", "1", "--quiet"),
    ]
    code = (
        f"import sys, torch; torch.set_num_threads({torch.get_num_threads()}); "
        "from dualdiff_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments])
    try:
        while process.poll() is None and not (tmp_path / SHEET).with_name(ADAPTER).exists():
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    train(data, tmp_path)
    assert content_of(tmp_path) == content_of(watched.folder)


# --- states -----------------------------------------------------------------------------------


@pytest.fixture
def run(watched: Disk, tmp_path: Path) -> Path:
    """A folder with a finished run."""
    return Path(shutil.copytree(watched.folder, tmp_path / "run"))


def bound_to(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()[HEADER])[RUN])


def test_every_flipped_bit_is_noticed(run: Path) -> None:
    path = run / STATE
    whole, bound = path.read_bytes(), bound_to(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    offsets = [*range(8), *(draw.randrange(8, header) for _ in range(40))]
    offsets += [header, len(whole) - 1, *(draw.randrange(header, len(whole)) for _ in range(40))]
    for offset in offsets:
        damaged = bytearray(whole)
        damaged[offset] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match="remove it to start over, or choose another folder"):
            state.steps_done(path, bound)
    path.write_bytes(whole)
    assert state.steps_done(path, bound) == 3


def test_what_is_no_state_ends_in_one_line(run: Path) -> None:
    path = run / STATE
    whole, bound = path.read_bytes(), bound_to(path)
    for content in (b"", b"\0" * 100, whole[:7], whole[: len(whole) // 2], whole + b"\0", b"{}"):
        path.write_bytes(content)
        with pytest.raises(OutputError, match=r"is damaged .*: remove it to start over"):
            state.steps_done(path, bound)
    path.unlink()
    for make in (path.mkdir, lambda: os.mkfifo(path)):
        make()
        with pytest.raises(OutputError, match="not a regular file"):
            state.steps_done(path, bound)
        (path.rmdir if path.is_dir() else path.unlink)()


def forge(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """A state with a right checksum, as a program with a mistake would write it."""
    tensors = load_file(path)
    change(tensors)
    bound = bound_to(path)
    header = {RUN: bound, CHECKSUM: state._checksum(tensors, bound)}
    save_file(tensors, path, {HEADER: json.dumps(header)})


def first(tensors: dict[str, Tensor], kind: str) -> str:
    """A tensor of more than one row."""
    return min(n for n, t in tensors.items() if n.startswith(f"{kind}.") and len(t) > 1)


def spoil(kind: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[first(tensors, kind)].flatten()[-1:].fill_(value)


def put(kind: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    def changed(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, kind)
        tensors[name] = change(tensors[name]).contiguous()

    return changed


NAN = float("nan")
STATES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN in a parameter": (spoil("parameter", NAN), r"parameter\..* holds NaN or infinity"),
    "infinite first moment": (spoil("exp_avg", float("inf")), r"exp_avg\..* holds NaN"),
    "NaN second moment": (spoil("exp_avg_sq", NAN), r"exp_avg_sq\..* holds NaN"),
    "NaN loss": (lambda t: t["losses"][1].fill_(NAN), "losses holds NaN"),
    "a parameter that broadcasts": (put("parameter", lambda t: t[:1]), r"parameter\..* is torch"),
    "a moment that broadcasts": (put("exp_avg", lambda t: t[:1]), r"exp_avg\..* is torch.float32"),
    "one number for a moment": (put("exp_avg_sq", lambda t: t.sum()), r"exp_avg_sq\..* is torch"),
    "another dtype": (put("parameter", lambda t: t.bfloat16()), r".* is torch.bfloat16"),
    "no moment": (lambda t: t.pop(first(t, "exp_avg")), r"exp_avg\..* is missing"),
    "one tensor more": (lambda t: t.update(more=torch.ones(1)), "more is not of this run"),
    "no losses": (lambda t: t.pop("losses"), "'losses'"),
    "losses of one branch": (lambda t: t.update(losses=torch.ones(3)), "its losses are"),
    "no step": (lambda t: t.update(losses=torch.ones(0, 2)), "its losses are"),
}


@pytest.mark.parametrize("fault", STATES)
def test_a_wrong_state_is_not_resumed(data: Path, run: Path, fault: str) -> None:
    change, match = STATES[fault]
    forge(run / STATE, change)
    before = content_of(run)
    with pytest.raises(OutputError, match=rf"is damaged \({match}.*remove it to start over"):
        train(data, run, steps=4)
    assert content_of(run) == before


def test_a_forged_state_that_changes_nothing_is_resumed(data: Path, run: Path) -> None:
    forge(run / STATE, lambda tensors: None)
    assert len(train(data, run, steps=4).losses) == 4


def test_a_state_of_an_earlier_version_is_refused_with_words(data: Path, run: Path) -> None:
    tensors, bound = load_file(run / STATE), json.dumps(bound_to(run / STATE))
    save_file(tensors, run / STATE, {RUN: bound})
    with pytest.raises(OutputError, match=r"has no checksum, an earlier version .*: remove it to"):
        train(data, run)


# --- not finite -------------------------------------------------------------------------------


def after_step(
    monkeypatch: pytest.MonkeyPatch, number: int, spoil: Callable[[_Run], object]
) -> None:
    """`spoil` the run once a step, counted from 1, is done."""
    step = _Run._step

    def spoiled(self: _Run, index: int) -> Tensor:
        losses = step(self, index)
        if index + 1 == number:
            with torch.no_grad():
                spoil(self)
        return losses

    monkeypatch.setattr(_Run, "_step", spoiled)


def a_parameter(run: _Run) -> torch.nn.Parameter:
    return next(iter(run.network.parameters.values()))


SPOILT: dict[str, tuple[Callable[[_Run], object], str]] = {
    "parameter": (lambda r: a_parameter(r).view(-1)[0].fill_(NAN), "parameter"),
    "first moment": (
        lambda r: r.optimizer.state[a_parameter(r)]["exp_avg"].fill_(NAN),
        "exp_avg",
    ),
    "second moment": (
        lambda r: r.optimizer.state[a_parameter(r)]["exp_avg_sq"].fill_(float("inf")),
        "exp_avg_sq",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_nothing_that_is_not_finite_is_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    spoil, name = SPOILT[what]
    every_two = {"steps": 4, "sample_every": 0}
    train(data, tmp_path, **{**every_two, "steps": 2})
    before = content_of(tmp_path)
    after_step(monkeypatch, 4, spoil)
    with pytest.raises(TrainingError, match=rf"^{name}\..* after step 4 .*lower learning_rate"):
        # a sheet is due, too: it would be drawn first
        train(data, tmp_path, **{**every_two, "sample_every": 4})
    assert content_of(tmp_path) == before


def test_a_gradient_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is; the root's slope at zero is not."""
    losses = _Run._losses
    monkeypatch.setattr(
        _Run, "_losses", lambda self, drawn: (x := losses(self, drawn)) + (0 * x).sqrt()
    )
    for clipped in (1.0, 0.0):
        with pytest.raises(TrainingError, match=r"gradient is not finite at step 1: use a lower"):
            train(data, tmp_path, max_grad_norm=clipped)
    assert set(content_of(tmp_path)) == {LOCK}


def test_an_adapter_too_large_for_its_dtype_is_not_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, 3, lambda run: a_parameter(run).view(-1)[0].fill_(1e5))
    with pytest.raises(AdapterError, match=r"not written: .* in float16; float16 ends at 65504"):
        train(data, tmp_path, sample_every=0, save_dtype="float16")
    assert not (tmp_path / ADAPTER).exists()
    # the steps are not lost
    assert train(data, tmp_path, sample_every=0).adapter == tmp_path / ADAPTER


def test_a_pair_that_cannot_be_used_leaves_a_gap_on_the_sheet(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(faults, "of_pictures", lambda *_: "its image is of one colour")
    assert train(data, tmp_path).adapter is not None
    assert (tmp_path / SHEET).is_file()
    assert "no pair of seed 0: its image is of one colour" in caplog.text


def test_a_sheet_that_does_not_fit_into_memory_is_named(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(faults, "of_pictures", full)
    with pytest.raises(TrainingError, match=r"pairs of checkpoint-2 were drawn: .*sample_every=0"):
        train(data, tmp_path)
    assert train(data, tmp_path, sample_every=0).adapter is not None


def test_writing_an_adapter_checks_it_first(tmp_path: Path) -> None:
    path = tmp_path / ADAPTER
    path.write_bytes(b"the old one")
    for value in (NAN, float("inf")):
        with pytest.raises(DualDiffError, match=r"not written: b holds NaN or infinity in float32"):
            adapter_files.write(path, {"a": torch.ones(2), "b": torch.tensor([0, value])})
    assert content_of(tmp_path) == {ADAPTER: b"the old one"}
