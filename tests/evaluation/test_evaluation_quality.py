"""Measures without weights find what was planted, and bad folders are told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine import cli
from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.evaluation import quality, report
from dualdiff_engine.evaluation.data import (
    find_good,
    find_pairs,
    find_real,
    reduced_mask,
)
from dualdiff_engine.evaluation.downstream import Material
from dualdiff_engine.evaluation.records import quality_record
from evaluation_cases import blobs, good, write_real, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", blobs(6, 0, 64))


def repaint(path: Path, change: object) -> None:
    pixels = np.array(Image.open(path))
    change(pixels)  # type: ignore[operator]
    Image.fromarray(pixels).save(path)


def test_agreeing_branches_differ_nowhere(run: Path) -> None:
    found = quality.agreement(find_pairs(run))
    assert found is not None
    assert found["difference_inside"] == found["leakage_outside"] == 0
    # under another pair's anomaly picture, most of the mask is black
    assert found["difference_chance"] > 0.5


def test_a_planted_leak_and_a_planted_disagreement_are_found(run: Path) -> None:
    material = blobs(6, 0, 64)

    def leak(pixels: np.ndarray) -> None:
        pixels[0:2, :, 1] = 51

    def fade(pixels: np.ndarray) -> None:
        inside = material.masks[4]
        pixels[inside] = 0

    repaint(run / "anomaly/00003.png", leak)
    repaint(run / "anomaly/00004.png", fade)
    found = quality.agreement(find_pairs(run))
    assert found is not None
    # 51 / 255 on two rows, of what lies outside the mask grown by a pixel
    outside = 64 * 64 - (np.ptp(np.nonzero(material.masks[3]), axis=1) + 3).prod()
    assert found["leakage_worst"]["name"] == "00003.png"
    assert found["leakage_worst"]["value"] == pytest.approx(0.2 * 128 / outside)
    assert found["leakage_outside"] == pytest.approx(0.2 * 128 / outside / 6)
    lost = material.images[4][material.masks[4]].mean() / 255
    assert found["difference_inside"] == pytest.approx(lost / 6)


def test_masks_are_measured(tmp_path: Path) -> None:
    masks = np.zeros((4, 20, 20), bool)
    masks[0, 2:4, 2:4] = masks[1, 2:4, 2:4] = masks[1, 10:14, 10:14] = masks[2, :10] = True
    images = np.full((4, 20, 20, 3), 100, np.uint8)
    run = write_run(tmp_path / "run", Material(images, masks))
    whole = np.zeros((20, 20), np.uint8)
    whole[:, :10] = 255
    Image.fromarray(whole).save(tmp_path / "whole.png")
    samples = find_pairs(run, object_mask=tmp_path / "whole.png")
    found = quality.masks(samples)
    assert found["empty"] == 0.25
    assert found["parts"] == pytest.approx((1 + 2 + 1) / 3)
    areas = np.array([4, 20, 200]) / 400
    assert found["area"]["mean"] == pytest.approx(areas.mean())
    assert (found["area"]["smallest"], found["area"]["median"]) == (areas[0], areas[1])
    assert found["off_object"] == pytest.approx((0 + 16 / 20 + 0.5) / 3)
    assert quality.masks(find_pairs(run))["off_object"] is None


def test_object_masks_of_a_run_are_found(run: Path) -> None:
    (run / "object_mask").mkdir()
    for path in (run / "image").iterdir():
        Image.new("L", (64, 64), 255).save(run / "object_mask" / path.name)
    assert quality.masks(find_pairs(run))["off_object"] == 0
    (run / "object_mask/00002.png").unlink()
    with pytest.raises(DataError, match=r"object_mask/00002\.png is missing"):
        find_pairs(run)


def test_diversity_is_the_mean_pairwise_distance(tmp_path: Path) -> None:
    # more than a block of them
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (quality._ROWS + 3, 8, 8, 3), dtype=np.uint8)
    flat = images.reshape(len(images), -1) / 255
    squares = ((flat[:, None] - flat[None]) ** 2).mean(axis=2) ** 0.5
    expected = squares.sum() / (len(flat) * (len(flat) - 1))
    # float32 sums of a 192-vector, 67,000 of them: relative 1e-5 is generous
    assert quality._pairwise(images) == pytest.approx(expected, rel=1e-5)
    assert quality._pairwise(images[:1]) is None
    same = Material(np.full((3, 64, 64, 3), 7, np.uint8), np.ones((3, 64, 64), bool))
    found = quality.measure(find_pairs(write_run(tmp_path / "same", same)))["diversity"]
    assert found == {"image": 0, "defect": 0, "mask": 0, "train": None}


def test_mask_diversity_is_one_minus_overlap(tmp_path: Path) -> None:
    masks = np.zeros((3, 64, 64), bool)
    masks[0, :, :32] = masks[1, :32, :] = True
    images = np.full((3, 64, 64, 3), 100, np.uint8)
    samples = find_pairs(write_run(tmp_path / "run", Material(images, masks)))
    # halves that share a quarter; the empty one does not count
    assert quality.measure(samples)["diversity"]["mask"] == pytest.approx(1 - 1 / 3)


def test_a_planted_copy_is_found_flipped_or_not(tmp_path: Path) -> None:
    train, drawn = blobs(8, 1, 64), blobs(6, 2, 64)
    drawn.images[2], drawn.masks[2] = train.images[5], train.masks[5]
    drawn.images[4], drawn.masks[4] = train.images[3][:, ::-1], train.masks[3][:, ::-1]
    # the defect of a third one, in other surroundings
    mask = train.masks[0][::-1]
    drawn.images[0][mask], drawn.masks[0] = train.images[0][::-1][mask], mask
    real = find_real(write_real(tmp_path / "real", train, good(4, 3, 64)))
    found = quality.measure(find_pairs(write_run(tmp_path / "run", drawn)), real)
    assert found["copies"]["image"]["copies"] == ["00002.png", "00004.png"]
    assert {"00000.png", "00002.png", "00004.png"} <= set(found["copies"]["defect"]["copies"])
    fresh = quality.measure(find_pairs(write_run(tmp_path / "new", blobs(6, 2, 64))), real)
    assert fresh["copies"]["image"]["copies"] == []
    assert 0.7 < fresh["copies"]["image"]["ratio"] < 1.4
    assert fresh["train"] == 8
    assert fresh["masks"]["train"]["empty"] == 0


def test_reduced_masks_keep_what_covers_a_third() -> None:
    mask = np.zeros((12, 12), bool)
    mask[:, 1] = mask[7, 5:] = True
    small = reduced_mask(mask, 4)
    assert small[:, 0].all()
    assert small[2, 2:].all()
    assert small.sum() == 4 + 2


def test_defects_of_a_run_are_told_apart_by_adapter(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "manifest.jsonl").open()]
    for row in rows[4:]:
        row["recipe"]["adapter"] = {"source": r"C:\x\part-hole", "sha256": "cd" * 32}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # a crash may have cut the last line off
    (run / "manifest.jsonl").write_text(text + '{"index": 6, "fi')
    groups = {name: len(found) for name, found in quality.by_defect(find_pairs(run))}
    assert groups == {"part-dent abababab": 4, "part-hole cdcdcdcd": 2}


def test_training_pictures_go_with_their_defect(tmp_path: Path, run: Path) -> None:
    real = write_real(tmp_path / "real", blobs(3, 1, 64), good(4, 3, 64))
    write_real(real, blobs(3, 5, 64), good(4, 3, 64), "hole")
    both = find_pairs(real)
    record = quality_record(both, find_real(real))
    assert {name: d["train"] for name, d in record["defects"].items()} == {"dent": 3, "hole": 3}
    assert record["defects"]["dent"]["copies"]["image"]["nearest"] == 0
    with pytest.raises(DataError, match="--defect"):
        quality_record(find_pairs(run), find_real(real))
    (one,) = quality_record(find_pairs(run), find_real(real, "hole"))["defects"].values()
    assert one["train"] == 3


def test_command_writes_record_and_table(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = write_real(tmp_path / "real", blobs(5, 1, 64), good(4, 3, 64))
    out = tmp_path / "record.json"
    words = ["eval", "quality", "--pairs", str(run), "--train", str(real), "--pictures", "4"]
    assert cli.main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    record = json.loads(out.read_text())
    (found,) = record["defects"].values()
    assert (found["pairs"], found["train"]) == (6, 4)
    assert report.quality(record) == shown.out.strip()
    assert "| leakage outside the mask | 0 |" in shown.out
    assert "--inception" in shown.err
    assert "vgg16-397923af.pth" in shown.err
    assert cli.main(["eval", "quality", "--pairs", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["defects"]


def test_unusable_folders_are_told(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match="holds no pairs: pass a folder"):
        find_pairs(tmp_path)
    empty = write_run(tmp_path / "empty", blobs(0, 0))
    with pytest.raises(DataError, match="0 pairs found, at least 2"):
        find_pairs(empty)
    single = write_run(tmp_path / "single", blobs(1, 0))
    with pytest.raises(DataError, match="1 pairs found, at least 2"):
        find_pairs(single)
    black = blobs(3, 0)
    black.masks[:] = False
    with pytest.raises(DataError, match="every mask is empty"):
        find_pairs(write_run(tmp_path / "black", black))
    Image.new("L", (8, 9)).save(run / "mask/00001.png")
    (run / "mask/00002.png").unlink()
    (run / "image/00003.png").write_bytes(b"no picture")
    (run / "anomaly/00004.png").write_bytes(b"no picture")
    with pytest.raises(DataError) as told:
        find_pairs(run)
    lines = str(told.value).splitlines()
    assert len(lines) == 1 + 4
    assert "mask/00001.png has size (8, 9), its image (64, 64)" in lines[1]
    assert "mask/00002.png is missing" in lines[2]
    assert "image/00003.png is not a readable picture" in lines[3]
    assert "anomaly/00004.png is not a readable picture" in lines[4]


def test_names_must_match_without_a_manifest(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", blobs(3, 0), manifest=False)
    assert len(find_pairs(run)) == 3
    (run / "mask/00001.png").rename(run / "mask/other.png")
    with pytest.raises(DataError, match=r"mask/other\.png: .*/image has no image of this name"):
        find_pairs(run)
    (run / "mask/other.png").unlink()
    with pytest.raises(DataError, match=r"mask/00001\.png is missing"):
        find_pairs(run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2 is damaged"),
        ('{"files": {"image": "image/a.png"}}', "line 2 is damaged"),
        (
            '{"files": {"image": "image/../../a.png"}, "recipe": {"adapter": {}}}',
            "expected image/NAME",
        ),
    ],
)
def test_damaged_manifests_are_told(run: Path, line: str, message: str) -> None:
    rows = (run / "manifest.jsonl").read_text().splitlines()
    (run / "manifest.jsonl").write_text("\n".join([rows[0], line, *rows[2:]]) + "\n")
    with pytest.raises(DataError, match=message):
        find_pairs(run)


def test_damaged_pixels_are_told(run: Path) -> None:
    whole = (run / "mask/00000.png").read_bytes()
    (run / "mask/00000.png").write_bytes(whole[: len(whole) - 40])
    with pytest.raises(DataError, match=r"mask/00000\.png"):
        find_pairs(run)


def test_real_pictures_and_good_ones_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not in MVTec layout"):
        find_real(tmp_path)
    real = write_real(tmp_path / "real", blobs(3, 1), good(1, 3))
    with pytest.raises(DataError, match="train/good: 0 good pictures found, at least 2"):
        find_good(real, "train")
    Image.new("L", (32, 32)).save(real / "ground_truth/dent/001_mask.png")
    with pytest.raises(DataError, match=r"001_mask\.png: the mask has no white pixel"):
        find_real(real)
    with pytest.raises(DataError, match="no folder 'scratch': choose one of dent"):
        find_real(real, "scratch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "/no/such/folder/x.json"], "choose a file in a folder that exists"),
        (["--defect", "dent"], "select from --train"),
        (["--vgg", "x.pth"], "pass --train"),
        (["--inception", "x.pth"], ""),
    ],
)
def test_unusable_choices_are_told(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "quality", "--pairs", str(run), *words]) == 2
    assert message in capsys.readouterr().err


def test_object_mask_must_be_a_picture(run: Path) -> None:
    with pytest.raises(SettingsError, match="not a readable picture"):
        find_pairs(run, object_mask=run / "manifest.jsonl")
