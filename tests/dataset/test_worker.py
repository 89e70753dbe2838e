"""A worker with the real engine: memory, faults, and what a pair is drawn on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("pydantic")

from dataset_cases import accepted, contents, rows, tiny_job
from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.painter import EnginePainter
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.store import Writer
from dualdiff_engine.dataset.worker import Worker
from dualdiff_engine.errors import OutputError
from dualdiff_engine.pipeline import generate

TASKS = [Task("p/a", number) for number in range(8)]


def run(job: Job, *batches: list[Task]) -> list[dict[str, Any]]:
    """Draw batches into the job's folder, in this process; returns what the worker said."""
    layout.make_folders(job.root)
    layout.set_fence(job.root, "r-d", "0-of-1", "r", whole=True)
    for name in ("p/a", "p/b"):
        for kind in layout.KINDS:
            (job.root / layout.STORE / name / kind).mkdir(parents=True)
    said: list[dict[str, Any]] = []
    writer = Writer(job.root, "r", "r-0", "0-of-1")
    # as in a process of its own
    with torch.inference_mode(False):
        worker = Worker(job, writer, EnginePainter(job, "cpu"), lambda m: said.append(dict(m)))
        try:
            for batch in batches:
                worker.draw(batch, False)
        finally:
            worker.close()
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of eight pairs, each drawn alone."""
    root = tmp_path_factory.mktemp("alone") / "data"
    run(tiny_job(root), *([task] for task in TASKS))
    return contents(root)


def changed(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Let a change of the clean latents [B, 2, 4, h, w] happen inside the engine."""
    own = generate.denoise

    def denoise(*arguments: Any) -> Any:
        noise, step_end = arguments[3], arguments[8]

        def stepped(step: int, time: torch.Tensor, latents: torch.Tensor) -> Any:
            return step_end(step, time, change(latents))

        assert noise.dim() == 5
        return own(*arguments[:8], stepped, *arguments[9:])

    monkeypatch.setattr(generate, "denoise", denoise)


def test_a_batch_that_does_not_fit_is_halved_and_nothing_lost(
    tmp_path: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = []

    def limited(latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 3:
            failed.append(len(latents))
            raise torch.OutOfMemoryError("out of memory")
        return latents

    changed(monkeypatch, limited)
    job = tiny_job(tmp_path / "data", limits={"batch": 8})
    said = run(job, TASKS)
    assert failed == [8, 4]
    assert contents(job.root) == alone
    assert accepted(job.root) == [task.key for task in TASKS]
    assert Counter(next(iter(message)) for message in said)["row"] == 8


def test_nan_and_black_set_aside_that_pair_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = tiny_job(tmp_path / "undisturbed", limits={"batch": 4})
    run(undisturbed, TASKS[:4])

    def broken(latents: torch.Tensor) -> torch.Tensor:
        latents = latents.clone()
        latents[1] = torch.nan
        return latents

    changed(monkeypatch, broken)
    own = generate.decode
    decoded: list[int] = []

    def decode(vae: Any, latents: torch.Tensor) -> Any:
        decoded.append(1)
        image, anomaly = own(vae, latents)
        # the pair after the one that is never decoded
        return (image * 0, anomaly) if len(decoded) == 2 else (image, anomaly)

    monkeypatch.setattr(generate, "decode", decode)
    job = tiny_job(tmp_path / "data", limits={"batch": 4})
    run(job, TASKS[:4])
    verdicts = {row["key"]: row["verdict"] for row in rows(job.root)}
    assert verdicts == {
        "p/a/000000.0": "accepted",
        "p/a/000001.0": "not_finite",
        "p/a/000002.0": "black",
        "p/a/000003.0": "accepted",
    }
    assert len(contents(job.root)) == 6
    assert contents(job.root).items() <= contents(undisturbed.root).items()


def test_rows_hold_what_reproduces_a_pair(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "data")
    run(job, TASKS[:2], [Task("p/b", 0)])
    recipes = {path.stem for path in (job.root / layout.RECIPES).iterdir()}
    for row in rows(job.root):
        assert row["recipe"] in recipes
        assert row["seed"] == Task.of_key(row["key"]).seed(0)
        assert {"agreement", "area", "parts"} >= row["scores"].keys()
    # both have the adapter of one file
    assert len(recipes) == 1
    assert len({row["recipe"] for row in rows(job.root)}) == 1


def test_pairs_on_canvases(tmp_path: Path) -> None:
    good, masks = tmp_path / "good", tmp_path / "masks"
    good.mkdir()
    masks.mkdir()
    levels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    for number, pixels in enumerate(levels):
        Image.fromarray(pixels).save(good / f"{number}.png")
    white = np.zeros((64, 64), np.uint8)
    white[20:40, 20:44] = 255
    Image.fromarray(white).save(masks / "defect.png")
    spec = tiny_job(tmp_path / "x").defects[0].model_dump(exclude_unset=True)
    placed = {"pictures": str(good), "object_masks": "all", "region_masks": str(masks)}
    job = tiny_job(
        tmp_path / "data",
        defects=[{**spec, **placed}],
        gates={"empty": "record", "full": "record", "area": ["p01", None]},
    )
    run(job, TASKS[:4])
    own = {Task.of_key(row["key"]).number: row for row in rows(job.root)}
    assert [own[n]["picture"] for n in range(4)] == ["0.png", "1.png", "2.png", "0.png"]
    assert all("change_outside" in row["scores"] for row in own.values())
    for number, row in own.items():
        files = layout.pictures_of(job.root, "p/a", number)
        if row["verdict"] != "accepted":
            files = layout.quarantined(job.root, "p/a", number, 0)
            assert row["verdict"] == "area"
        same = np.asarray(Image.open(files["image"])) == levels[number % 3]
        # all but the region is the normal picture
        assert same.all(axis=2).mean() > 0.3


def test_a_full_disk_stops_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, written = layout.os.fsync, []

    def fsync(handle: int) -> None:
        written.append(handle)
        if len(written) > 10:
            raise OSError(28, "No space left on device")
        own(handle)

    job = tiny_job(tmp_path / "data")
    layout.make_folders(job.root)
    monkeypatch.setattr(layout.os, "fsync", fsync)
    with pytest.raises(OutputError, match=r"No space left on device.*free some space"):
        run(job, TASKS[:4])
    monkeypatch.undo()
    for row in rows(job.root):
        number = Task.of_key(row["key"]).number
        assert all(path.is_file() for path in layout.pictures_of(job.root, "p/a", number).values())
