"""Training runs: what is refused before they start, what they write, and that they continue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dualdiff_engine import Engine
from dualdiff_engine.adapters import files
from dualdiff_engine.cli import main
from dualdiff_engine.errors import DataError, OutputError, SettingsError, TrainingError
from dualdiff_engine.training import TrainingOptions, TrainingResult, train_adapter
from dualdiff_engine.training.data import find_examples, sheet_backgrounds
from dualdiff_engine.training.state import STATE
from dualdiff_engine.training.trainer import ADAPTER, _folder, _Run
from training_cases import DEFECT, SIZE, base_of, mask_of, options_of, picture_of, save, write_data


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    """Unlike elsewhere, gradients are wanted."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def train(data: Path, out: Path, **changes: Any) -> TrainingResult:
    stop = changes.pop("should_stop", lambda: False)
    options = options_of(**changes)
    return train_adapter(base_of(options.background), data, out, options, should_stop=stop)


# --- data -------------------------------------------------------------------------------------


def damage(path: Path) -> None:
    """A byte of the compressed pixels changed."""
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 0xFF
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def keep_one(root: Path) -> None:
    for index in (1, 2):
        picture_of(root, index).unlink()


BLACK, WHITE = np.zeros((SIZE, SIZE), np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
OBJECT = "object_mask"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no masks": (lambda r: mask_of(r, 1).unlink(), r"001\.png has no mask: add .*001_mask\.png"),
    "mask of another size": (
        lambda r: save(mask_of(r, 1), WHITE[:32]),
        r"001_mask\.png: the mask has size \(64, 32\), its picture \(64, 64\): make them equal",
    ),
    "empty mask": (
        lambda r: save(mask_of(r, 1), BLACK),
        r"001_mask\.png: the mask has no white .*: draw",
    ),
    "mask of ones": (
        lambda r: save(mask_of(r, 1), WHITE // 255),
        r"001_mask\.png: the mask has no white pixel \(brightest value 1: save white as 255\)",
    ),
    "damaged mask": (lambda r: damage(mask_of(r, 1)), r"001_mask\.png.*: save it again"),
    "one picture": (keep_one, r"test/hole: 1 pictures found, at least 2 are needed .*: add more"),
    "no picture": (
        lambda r: [picture_of(r, n).unlink() for n in range(3)],
        r"test/hole: 0 pictures found, at least 2",
    ),
    "unreadable picture": (lambda r: picture_of(r, 1).write_text("x"), r"001\.png.*: save it ag"),
    "cut-off picture": (lambda r: cut_off(picture_of(r, 1)), r"001\.png.*: save it again"),
    "damaged picture": (lambda r: damage(picture_of(r, 1)), r"001\.png.*: save it again"),
    "no object mask": (
        lambda r: mask_of(r, 1, OBJECT).unlink(),
        r"001\.png has no object mask: add .*object_mask/hole/001_mask\.png",
    ),
    "object mask of another size": (
        lambda r: save(mask_of(r, 1, OBJECT), WHITE[:32]),
        r"001_mask\.png: the object mask has size \(64, 32\)",
    ),
    "empty object mask": (
        lambda r: save(mask_of(r, 1, OBJECT), BLACK),
        r"001_mask\.png: the object mask has no white pixel",
    ),
    "object everywhere": (
        lambda r: save(mask_of(r, 1, OBJECT), WHITE),
        r"001_mask\.png: the object mask is all white",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_unusable_data_is_named(fault: str, tmp_path: Path) -> None:
    spoil, match = FAULTS[fault]
    root = write_data(tmp_path)
    spoil(root)
    with pytest.raises(DataError, match=match):
        find_examples(root, options_of(background=True))
    if "object" in fault:
        # read for background only
        assert len(find_examples(root, options_of())) == 3


def test_backgrounds_of_sheets_are_checked_too(data: Path, tmp_path: Path) -> None:
    options = options_of(background=True, sample_every=1)
    examples = find_examples(data, options)
    (good,) = sheet_backgrounds(data, examples, options)
    assert good.picture == data / "train" / "good" / "000.png"
    assert sheet_backgrounds(data, examples, options_of(background=True)) == []
    assert len(sheet_backgrounds(tmp_path, examples, options)) == 3
    root = write_data(tmp_path)
    save(mask_of(root, 0, OBJECT, "good"), WHITE[:32])
    with pytest.raises(DataError, match=r"good/000_mask\.png: the object mask has size \(64, 32\)"):
        sheet_backgrounds(root, examples, options)


def test_every_fault_has_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_data(tmp_path / "data")
    mask_of(root, 0).unlink()
    save(mask_of(root, 1), BLACK)
    cut_off(picture_of(root, 2))
    arguments = ["train", "--base", base_of(False), "--data", root, "--defect", DEFECT]
    assert main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("unusable data")
    assert [f"{n:03d}" in line for n, line in enumerate(lines[1:])] == [True] * 3
    assert not (tmp_path / "out").exists()


def test_a_missing_defect_is_told_with_those_there_are(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder 'crack': choose one of hole"):
        find_examples(data, TrainingOptions("crack"))
    with pytest.raises(DataError, match="not in MVTec layout"):
        find_examples(tmp_path, TrainingOptions("crack"))


def test_pictures_limits_by_name(data: Path) -> None:
    chosen = find_examples(data, options_of(pictures=2))
    assert [example.picture.stem for example in chosen] == ["000", "001"]


# --- runs -------------------------------------------------------------------------------------


def test_loss_falls_on_pictures_seen_over_and_over(data: Path, tmp_path: Path) -> None:
    options = options_of(
        steps=25, batch=4, learning_rate=1e-2, flips="none", latents="mean", pictures=2, rank=8
    )
    result = train_adapter(base_of(False), data, tmp_path, options)
    run = _Run(base_of(False), data, tmp_path, options, False)
    run._prepare()
    run.lessons = run._encode()
    # draws that no step has seen, before and after
    drawn = run.lessons.draw(options_of(batch=16, seed=9, pictures=2), 0, 1000)
    with torch.no_grad():
        after = run._losses(drawn)
        for name, parameter in run.network.parameters.items():
            if ".up." in name or "temporal_o" in name:
                parameter.zero_()
        before = run._losses(drawn)
    assert result.adapter is not None
    print(f"losses {before.tolist()} -> {after.tolist()}")
    assert (after < 0.9 * before).all()


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    train(data, out, **RUN)
    return out


RUN = {
    "background": True,
    "text_encoder": True,
    "prompt_dropout": 0.3,
    "steps": 6,
    "learning_rate": 1e-3,
    "checkpoint_every": 2,
}


class Killed(BaseException):
    """Nothing may catch it and tidy up."""


def test_a_killed_run_continues_to_the_same_result(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    asked = 0

    def die() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4:
            # after the third step, whose state was never written, and before the fourth's
            raise Killed
        return False

    with pytest.raises(Killed):
        # more steps may be asked for on the way
        train(data, tmp_path, **{**RUN, "steps": 5}, should_stop=die)
    assert not (tmp_path / ADAPTER).exists()
    result = train(data, tmp_path, **RUN)
    for name in (ADAPTER, STATE):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name
    record = (undisturbed / "training.json").read_text()
    assert (tmp_path / "training.json").read_text() == record
    assert len(result.losses) == 6


def test_a_stopped_run_continues(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path, **RUN, should_stop=lambda: True)
    assert (result.adapter, len(result.losses)) == (None, 1)
    train(data, tmp_path, **RUN)
    assert (tmp_path / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()


def arguments(data: Path, out: Path) -> list[str]:
    return [
        *("train", "--base", str(base_of(True)), "--data", str(data), "--defect", DEFECT),
        *("--out", str(out), "--size", str(SIZE), "--rank", "4", "--blend-width", "12"),
        *("--batch", "2", "--background", "--text-encoder", "--prompt-dropout", "0.3"),
        *("--steps", "6", "--learning-rate", "1e-3", "--checkpoint-every", "2"),
        *("--sample-every", "0"),
    ]


def test_kill_minus_nine(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); from dualdiff_engine.cli import main; "
        "sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, *arguments(data, tmp_path), "--quiet"])
    try:
        while process.poll() is None and not (tmp_path / STATE).exists():
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / STATE).exists()
    assert main([*arguments(data, tmp_path), "--quiet"]) == 0
    assert (tmp_path / ADAPTER).read_bytes() == (undisturbed / ADAPTER).read_bytes()


def test_ctrl_c_ends_after_the_step(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _Run._step

    def interrupted(self: _Run, number: int) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(_Run, "_step", interrupted)
    assert main(arguments(data, tmp_path)) == 130
    assert load_file(tmp_path / STATE)["losses"].shape == (1, 2)
    assert "stopping after this step" in capfd.readouterr().err


def test_another_run_is_not_continued(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"another rank \(4, not 8\): choose another folder"):
        train(data, undisturbed, **{**RUN, "rank": 8})
    with pytest.raises(SettingsError, match="holds a run of 6 steps, more than steps=5: choose"):
        train(data, undisturbed, **{**RUN, "steps": 5})
    other = write_data(tmp_path / "data", count=2)
    with pytest.raises(SettingsError, match="another data: choose"):
        train(other, undisturbed, **RUN)
    (tmp_path / STATE).write_bytes((undisturbed / STATE).read_bytes()[:1000])
    with pytest.raises(OutputError, match=r"is damaged .*: remove it to start over"):
        train(data, tmp_path, **RUN)


def test_a_folder_in_use_is_refused(data: Path, tmp_path: Path) -> None:
    with _folder(tmp_path), pytest.raises(OutputError, match="another run is writing"):
        train(data, tmp_path, steps=1)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        train(data, tmp_path / "file", steps=1)


def test_a_loss_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = _Run._losses
    monkeypatch.setattr(_Run, "_losses", lambda self, drawn: losses(self, drawn) / 0)
    with pytest.raises(TrainingError, match="not finite at step 1: use a lower learning_rate"):
        train(data, tmp_path, steps=2)
    assert not (tmp_path / STATE).exists()


def test_out_of_memory_says_what_helps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: _Run, drawn: object) -> None:
        raise torch.OutOfMemoryError("allocating")

    monkeypatch.setattr(_Run, "_losses", full)
    with pytest.raises(TrainingError, match="out of memory: use a smaller batch"):
        train(data, tmp_path, steps=1)


def test_sizes_and_prompts_are_checked_before_anything_runs(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="size must be a multiple of 8"):
        train(data, tmp_path, size=60)
    with pytest.raises(SettingsError, match="tokens, at most 77"):
        train(data, tmp_path, image_prompt="sks " * 200)
    assert not (tmp_path / STATE).exists()


def test_what_a_run_writes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    options = ["--sample-every", "4", "--samples", "2", "--sample-steps", "1"]
    options += ["--save-dtype", "float16", "--checkpoint-every", "100"]
    assert main([*arguments(data, out), *options]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{out / ADAPTER} after 6 steps"]
    assert "loss=" in told.err
    with Image.open(out / "checkpoint-4" / "sheet.png") as sheet:
        assert sheet.size == (2 * SIZE + 4, 3 * SIZE + 8)
    with Image.open(out / "loss.png") as curve:
        assert curve.width > 400
    record = json.loads((out / "training.json").read_text())
    assert record["adapter"]["sha256"] == files.sha256(out / ADAPTER)
    assert record["options"]["learning_rate"] == 1e-3
    assert (record["steps_done"], record["device"], record["dtype"]) == (6, "cpu", "float32")
    assert len(record["data"]) == 9
    assert record["data"][0]["file"] == f"test/{DEFECT}/000.png"
    assert len(record["loss"]["image"]) == 6
    assert str(tmp_path) not in (out / "training.json").read_text()
    assert {t.dtype for t in load_file(out / ADAPTER).values()} == {torch.float16}
    assert not list(out.rglob("*.partial"))
    assert main(["inspect", str(out / ADAPTER), "--base", str(base_of(True))]) == 0
    with Engine.from_pretrained(base_of(True), adapter=out) as engine:
        assert engine.active_adapter == "out"
