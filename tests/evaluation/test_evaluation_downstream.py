"""The downstream test learns what can be learned, repeats itself, and its commands work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dualdiff_engine import cli
from dualdiff_engine.bench import demo_quality, demo_tasks
from dualdiff_engine.demo.factory.samples import make
from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.evaluation import downstream, report, tasks
from dualdiff_engine.evaluation.data import find_pairs
from dualdiff_engine.evaluation.downstream import DownstreamOptions, Material, Task
from dualdiff_engine.evaluation.segmentation_unet import UNet
from dualdiff_engine.pair import Pair
from evaluation_cases import blobs, good, write_real, write_run

SMALL = DownstreamOptions(
    steps=30, batch=8, learning_rate=1e-2, seeds=(0, 1), size=32, widths=(4, 8, 16)
)
WORDS = ["--steps", "2", "--batch", "2", "--size", "32", "--seeds", "0,1"]


def small_task() -> Task:
    arms = {"real": blobs(2, 1), "generated": blobs(12, 2), "ceiling": blobs(12, 3)}
    return Task(arms, good(8, 4), blobs(10, 5), good(10, 6))


def test_network_learns_an_easy_defect() -> None:
    task = small_task()
    del task.arms["ceiling"], task.arms["real"]  # type: ignore[attr-defined]
    record = downstream.run(task, SMALL)
    assert record["arms"]["generated"]["mean"]["pixel_ap"] > 0.95
    assert record["arms"]["generated"]["mean"]["image_auroc"] > 0.95
    rows = record["arms"]["generated"]["runs"]
    assert [row["seed"] for row in rows] == [0, 1]
    values = [row["pixel_ap"] for row in rows]
    found = record["arms"]["generated"]
    assert found["mean"]["pixel_ap"] == pytest.approx(np.mean(values))
    assert found["spread"]["pixel_ap"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert json.loads(json.dumps(record)) == record


def test_an_untrained_network_knows_nothing() -> None:
    """The easy set is not so easy that any scores would do."""
    torch.manual_seed(0)
    task = small_task()
    marks = Material(task.test.images, np.roll(task.test.masks, 1, axis=0))
    found = downstream.test(UNet((4, 8, 16)).eval(), marks, task.test_good)
    assert found["pixel_ap"] < 0.5


def test_seeds_alone_decide() -> None:
    task, short = (
        small_task(),
        DownstreamOptions(steps=3, batch=4, size=32, widths=(4, 8), seeds=(0,)),
    )
    weights = []
    for state, seed in ((1, 5), (2, 5), (3, 6)):
        torch.manual_seed(state)
        network = downstream.train(task.arms["real"], task.good, short, seed)
        # the caller's generator is left as it was
        assert torch.equal(
            torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(state))
        )
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_arms_see_the_same_good_pictures_in_the_same_order() -> None:
    plain = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.full(
        (32, 32, 3), 20, np.uint8
    )
    shown = []
    for count in (2, 12):
        batches = downstream._batches(blobs(count, 1), plain, 4, 7)
        shown.append([next(batches) for _ in range(3)])
    for (pictures, masks), (others, other_masks) in zip(*shown, strict=True):
        assert torch.equal(pictures[2:], others[2:])
        assert not masks[2:].any()
        assert not other_masks[2:].any()
        assert masks[:2].flatten(1).any(1).all()
    (pictures, _) = next(downstream._batches(blobs(3, 1), plain[:0], 4, 7))
    assert len(pictures) == 4


def test_masks_turn_with_their_pictures() -> None:
    material = blobs(16, 1)
    images = np.where(material.masks[..., None], np.uint8(250), np.uint8(5)).repeat(3, axis=3)
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    masks = torch.from_numpy(material.masks).float()
    turned, marks = downstream._augmented(pictures, masks, torch.Generator().manual_seed(0))
    assert torch.equal((turned > 0.5).all(dim=1), marks > 0)
    assert not torch.equal(marks, masks)


def test_pictures_without_a_mask_are_left_out() -> None:
    task = small_task()
    task.arms["generated"].masks[:5] = False
    record = downstream.run(
        task, DownstreamOptions(steps=1, batch=2, size=32, widths=(4, 8), seeds=(0,))
    )
    assert record["arms"]["generated"]["pictures"] == 7
    assert record["arms"]["generated"]["spread"]["pixel_ap"] is None
    task.arms["generated"].masks[:] = False
    with pytest.raises(SettingsError, match="arm 'generated': 0 usable pictures found"):
        downstream.run(task, SMALL)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"size": 40}, "size must be a multiple of 16"),
        ({"size": 0}, "size must be"),
        ({"steps": 0}, "steps must be"),
        ({"batch": 3}, "batch must be even"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"seeds": ()}, "seeds must differ"),
        ({"seeds": (2**63,)}, "seed must be"),
        ({"learning_rate": 0.0}, "learning_rate must be"),
    ],
)
def test_impossible_options_are_told(choice: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        DownstreamOptions(**choice)  # type: ignore[arg-type]


def runs(*values: float) -> dict[str, object]:
    rows = [dict.fromkeys(downstream.METRICS, v) | {"seed": s} for s, v in enumerate(values)]
    return {"pictures": 8, "runs": rows, **downstream.summary(rows)}


def test_mean_over_tasks_and_its_spread_are_of_seeds() -> None:
    records = {
        "a/x": {"arms": {"real": runs(0.2, 0.4), "generated": runs(0.5, 0.7)}},
        "b/y": {"arms": {"real": runs(0.6, 0.4), "generated": runs(0.7, 0.9)}},
    }
    found = report.overall(records)
    assert found["real"]["mean"]["pixel_ap"] == pytest.approx(0.4)
    # 0.4 and 0.4 by seed, though tasks differ
    assert found["real"]["spread"]["pixel_ap"] == pytest.approx(0, abs=1e-12)
    # 0.6 and 0.8
    assert found["generated"]["spread"]["pixel_ap"] == pytest.approx(0.2 / 2**0.5)
    assert report.gap_closed(found, "pixel_ap") is None
    ceiling = {**found, "ceiling": runs(0.8, 0.8)}
    assert report.gap_closed(ceiling, "pixel_ap") == pytest.approx((0.7 - 0.4) / (0.8 - 0.4))
    assert report.gap_closed({**ceiling, "ceiling": runs(0.4, 0.4)}, "pixel_ap") is None
    table = report.downstream(records)
    assert "| a/x | 8 real | 0.300 ± 0.141 |" in table
    assert "| **mean** | 8 generated | 0.700 ± 0.141 |" in table


def test_headline_says_what_was_found() -> None:
    def told(real: object, generated: object) -> str:
        arms = {"real": real, "generated": generated, "ceiling": runs(0.9, 0.9)}
        return report.headline({"a/x": {"arms": arms}})

    real = runs(0.4, 0.5)
    assert "ahead of 0.450 ± 0.071 on 8 real" in told(real, runs(0.7, 0.65))
    assert "50% of the way to 0.900" in told(real, runs(0.7, 0.65))
    # within the spread is no finding
    assert "no different from" in told(real, runs(0.5, 0.5))
    behind = told(real, runs(0.1, 0.1))
    assert "behind" in behind
    assert behind.endswith("; it is 0.900 ± 0.000 on as many real ones.")


def factory_run(root: Path, part: str, defect: str, count: int) -> Path:
    """Factory pictures in place of generated ones."""
    products = [make(part, defect, seed=n) for n in range(count)]
    images = np.stack([p.image for p in products])
    return write_run(root, Material(images, np.stack([p.mask > 0 for p in products])))


def test_command_on_users_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_run(tmp_path / "run", blobs(6, 2))
    real = write_real(tmp_path / "real", blobs(8, 1), good(8, 4))
    out = tmp_path / "record.json"
    words = ["eval", "downstream", "--pairs", str(pairs), "--real", str(real), "--defect", "dent"]
    words += [*WORDS, "--few", "2"]
    assert cli.main([*words, "--ceiling", "3", "--out", str(out)]) == 0
    record = json.loads(out.read_text())["tasks"]["dent"]
    counts = {arm: found["pictures"] for arm, found in record["arms"].items()}
    assert counts == {"real": 2, "generated": 6, "both": 8, "ceiling": 5}
    assert record["pictures"] == {"good": 4, "test": 3, "good test": 4}
    shown = capsys.readouterr()
    assert "| dent | 5 real (ceiling) |" in shown.out
    assert "generated, seed 1: AP" in shown.err
    assert cli.main([*words, "--few", "7"]) == 2
    assert "7 of them for training leave 1 for testing" in capsys.readouterr().err


def test_command_on_the_factory(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(tasks, "GOOD", 4)
    monkeypatch.setattr(tasks, "TEST", 3)
    pairs = factory_run(tmp_path / "run", "tile", "chip", 3)
    words = ["eval", "downstream", "--pairs", str(pairs), "--demo", "tile/chip", *WORDS]
    assert cli.main([*words, "--json", "--quiet"]) == 0
    record = json.loads(capsys.readouterr().out)["tasks"]["tile/chip"]
    counts = {arm: found["pictures"] for arm, found in record["arms"].items()}
    assert counts == {"real": 8, "generated": 3, "both": 11, "ceiling": 3}
    assert record["pictures"] == {"good": 4, "test": 3, "good test": 3}


def test_no_picture_is_in_two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "GOOD", 4)
    monkeypatch.setattr(tasks, "TEST", 4)
    pairs = find_pairs(factory_run(tmp_path / "run", "tile", "chip", 4))
    task = tasks.factory_task(pairs, "tile", "chip", 128)
    both = task.arms.pop("both")  # type: ignore[attr-defined]
    assert len(both) == len(task.arms["real"]) + len(task.arms["generated"])
    sets = [m.images for m in (*task.arms.values(), task.test)] + [task.good, task.test_good]
    pictures = [image.tobytes() for images in sets for image in images]
    assert len(set(pictures)) == len(pictures) == 8 + 4 * 5


def test_demo_record_of_all_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "GOOD", 3)
    monkeypatch.setattr(tasks, "TEST", 3)
    monkeypatch.setattr(demo_quality, "draw", lambda *_: None)
    for part, defect in (("tile", "chip"), ("fabric", "hole")):
        factory_run(tmp_path / f"{part}-{defect}", part, defect, 4)
    words = [str(tmp_path), "--out", str(tmp_path), "--count", "3", "--steps", "1", "--seeds", "3"]
    demo_quality.main([*words, "--only", "tile/chip"])
    demo_quality.main([*words, "--only", "tile/chip", "--only", "fabric/hole"])
    record = json.loads((tmp_path / "downstream.json").read_text())
    assert list(record["tasks"]) == ["fabric/hole", "tile/chip"]
    assert record["tasks"]["tile/chip"]["source"]["pairs"] == 3
    assert record["overall"]["arms"] == report.overall(record["tasks"])
    measured = json.loads((tmp_path / "quality.json").read_text())["defects"]
    assert list(measured) == ["fabric/hole", "tile/chip"]
    assert measured["tile/chip"]["train"] == 8

    def no_training(*_: object) -> None:
        raise AssertionError("what is recorded is not trained again")

    monkeypatch.setattr(demo_tasks, "run", no_training)
    demo_quality.main([*words, "--only", "tile/chip"])
    with pytest.raises(AssertionError, match="not trained again"):
        demo_quality.main([*words, "--only", "tile/chip", "--steps", "2"])


class DrawingEngine:
    """Stands in for the engine: grey pairs, and what it was asked for."""

    asked: list[tuple[list[int], bool]] = []  # noqa: RUF012

    def __enter__(self) -> DrawingEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load_adapter(self, *_: object) -> None:
        pass

    def stream(self, seeds: list[int], **options: object) -> Iterator[Pair]:
        self.asked.append((seeds, "background" in options))
        grey, mask = Image.new("RGB", (128, 128), "grey"), Image.new("L", (128, 128), 255)
        for seed in seeds:
            yield Pair(
                grey,
                grey,
                mask,
                seed,
                False,
                {"adapter": {"source": "a/b.bin", "sha256": "c" * 64}},
            )


def test_demo_draws_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualdiff_engine.demo.presets import find
    from dualdiff_engine.engine import Engine

    monkeypatch.setattr(Engine, "from_pretrained", lambda *_: DrawingEngine())
    monkeypatch.setattr(demo_quality, "SHARED", 4)
    monkeypatch.setattr(demo_quality, "_shipped", lambda preset: "c" * 8)
    demo_quality.draw(find("tile/chip"), tmp_path, 6)
    demo_quality.draw(find("tile/chip"), tmp_path, 6)
    demo_quality.draw(find("tile/chip"), tmp_path, 9)
    seeds = [0, 1, 2, 3], [4, 5], [6, 7], [8]
    assert DrawingEngine.asked == [(some, True) for some in seeds]
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").open()]
    assert [row["seed"] for row in rows] == list(range(9))
    wholes = [np.array(Image.open(tmp_path / f"object_mask/{n:05d}.png")) for n in range(9)]
    # those of the part that lent its surroundings
    for n, whole in enumerate(wholes):
        assert np.array_equal(whole, make("tile", seed=n - n % 4).object_mask)
    # trained anew, it does not go with what the old one drew
    monkeypatch.setattr(demo_quality, "_shipped", lambda preset: "d" * 8)
    with pytest.raises(DataError, match="holds pairs of another adapter: remove it"):
        demo_quality.draw(find("tile/chip"), tmp_path, 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "pass --real FOLDER, or --demo"),
        (["--demo", "tile/chip", "--real", "."], "pass --real FOLDER, or --demo"),
        (["--demo", "tile/dent"], "no demo 'tile/dent'"),
        (["--real", "."], "choose the defect to test with --defect"),
        (["--demo", "tile/chip", "--seeds", "1,x"], "must be numbers such as 0,1,2"),
        (["--demo", "tile/chip", "--size", "100"], "multiple of 16"),
        (["--demo", "tile/chip", "--out", "/no/such/x.json"], "a folder that exists"),
    ],
)
def test_unusable_choices_are_told(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = write_run(tmp_path / "run", blobs(2, 2))
    assert cli.main(["eval", "downstream", "--pairs", str(pairs), *words]) == 2
    assert message in capsys.readouterr().err


def test_real_folders_need_good_pictures(tmp_path: Path) -> None:
    pairs = find_pairs(write_run(tmp_path / "run", blobs(2, 2)))
    real = write_real(tmp_path / "real", blobs(6, 1), good(2, 4))
    with pytest.raises(DataError, match="good: 1 good pictures found, at least 2"):
        tasks.user_task(pairs, real, "dent", 32, few=2)
