"""Folders as people have them: names, suffixes and what other programs leave behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.evaluation.data import find_good, find_pairs, find_real
from dualdiff_engine.pipeline.background import cut_out
from dualdiff_engine.settings import Background
from dualdiff_engine.training.data import find_examples, sheet_backgrounds
from training_cases import DEFECT, SIZE, mask_of, options_of, picture_of, save, write_data

BLACK, WHITE = np.zeros((SIZE, SIZE), np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
Change = Callable[[Path], object]


def renamed(path: Path, name: str) -> Path:
    """Stored again where the suffix differs."""
    other = path.with_name(name)
    if other.suffix.lower() == path.suffix:
        return path.rename(other)
    with Image.open(path) as picture:
        picture.save(other)
    path.unlink()
    return other


# --- what other programs leave behind ---------------------------------------------------------


def junk(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0\5\x16\7Mac OS X")


LITTER: dict[str, Change] = {
    "a notebook's folder among the defects": lambda r: (r / "test/.ipynb_checkpoints").mkdir(),
    "a bin among the defects": lambda r: junk(r / "test/.Trash-1000/files/000.png"),
    "an unpacked archive": lambda r: junk(r / "test/__MACOSX/hole/._000.png"),
    "a network drive's thumbnails": lambda r: junk(r / "test/@eaDir/000.png"),
    "resource forks": lambda r: [
        junk(r / "test" / DEFECT / "._000.png"),
        junk(r / "ground_truth" / DEFECT / "._000_mask.png"),
        junk(r / "train/good/._000.png"),
    ],
    "a sync tool's copy": lambda r: shutil.copy(picture_of(r, 0), r / "test" / DEFECT / ".000.png"),
    "a notebook's folder among the pictures": lambda r: (
        r / "test" / DEFECT / ".ipynb_checkpoints"
    ).mkdir(),
    "a folder with a picture's name": lambda r: (r / "test" / DEFECT / "old.png").mkdir(),
    "thumbnails and settings": lambda r: [
        junk(r / "test" / DEFECT / name) for name in ("Thumbs.db", ".DS_Store", "desktop.ini")
    ],
}


@pytest.mark.parametrize("case", LITTER)
def test_what_other_programs_leave_is_no_picture_and_no_defect(case: str, tmp_path: Path) -> None:
    root = write_data(tmp_path)
    save(root / "train/good/001.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    LITTER[case](root)
    assert len(find_examples(root, options_of(background=True))) == 3
    assert len(find_real(root)) == len(find_pairs(root)) == 3
    assert len(find_good(root, "train")) == 2
    with pytest.raises(DataError, match=f"no folder 'scratch': choose one of {DEFECT}$"):
        find_examples(root, options_of().__class__("scratch"))


# --- names of masks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "mask"),
    [
        ("000.PNG", "000_mask.PNG"),
        ("000.png", "000_mask.PNG"),
        ("000.jpg", "000_mask.jpg"),
        ("000.jpg", "000_mask.png"),
        ("000.tif", "000_mask.tiff"),
        ("000.bmp", "000_mask.bmp"),
    ],
)
def test_masks_have_the_suffixes_that_pictures_have(
    picture: str, mask: str, tmp_path: Path
) -> None:
    root = write_data(tmp_path)
    expected = find_examples(root, options_of(background=True))[0].anomaly(SIZE)
    renamed(picture_of(root, 0), picture)
    renamed(mask_of(root, 0), mask)
    whole = renamed(mask_of(root, 0, "object_mask"), mask)
    first = find_examples(root, options_of(background=True))[0]
    assert (first.picture.name, first.mask.name, first.object_mask) == (picture, mask, whole)
    assert find_real(root)[0].object_mask == whole
    # JPEG differs a little, mostly along edges
    assert np.abs(first.anomaly(SIZE).astype(int) - expected).mean() < 3


@pytest.mark.parametrize(
    "near",
    [
        "000.png",
        "000-mask.png",
        "000_MASK.png",
        "mask_000.png",
        "000mask.png",
        "000_mask.webp",
        "000.npy",
    ],
)
def test_a_near_name_is_named(near: str, tmp_path: Path) -> None:
    root = write_data(tmp_path)
    path = mask_of(root, 0).rename(mask_of(root, 0).with_name(near))
    with pytest.raises(DataError) as refused:
        find_examples(root, options_of())
    assert f"{picture_of(root, 0)} has no mask: save {path} as {mask_of(root, 0)} if" in str(
        refused.value
    )


def test_the_mask_of_another_picture_is_not_near(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    renamed(picture_of(root, 0), "00.png")
    with pytest.raises(
        DataError, match=r"00\.png has no mask: add .*/00_mask\.png or remove the picture"
    ):
        find_examples(root, options_of())


def test_two_masks_of_one_picture_are_refused(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    save(mask_of(root, 0).with_suffix(".bmp"), WHITE)
    with pytest.raises(DataError, match=r"has 000_mask\.bmp and 000_mask\.png: keep one"):
        find_examples(root, options_of())


def test_a_run_without_a_manifest_finds_masks_of_any_suffix(tmp_path: Path) -> None:
    for n in range(2):
        save(tmp_path / f"image/{n}.jpg", np.full((SIZE, SIZE, 3), 90, np.uint8))
        save(tmp_path / f"mask/{n}.png", np.eye(SIZE, dtype=np.uint8) * 255)
    assert [sample.mask.name for sample in find_pairs(tmp_path)] == ["0.png", "1.png"]
    (tmp_path / "mask/0.png").unlink()
    with pytest.raises(DataError, match=r"mask/0\.jpg is missing"):
        find_pairs(tmp_path)


# --- what masks say ---------------------------------------------------------------------------


def test_both_colours_of_a_mask_count(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    colours = np.zeros((SIZE, SIZE, 3), np.uint8)
    colours[4:8, 4:8, 0] = colours[30:40, 30:40, 1] = 255
    save(mask_of(root, 0), colours)
    assert find_real(root)[0].flags().sum() == 16 + 100
    alone = find_examples(root, options_of())[0].anomaly(SIZE)
    assert (alone.max(2) > 0)[5:7, 5:7].all()
    assert (alone.max(2) > 0)[32:38, 32:38].all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask // 255, r"has no white pixel \(brightest value 1: save white as 255\)"),
        (lambda mask: BLACK, "has no white pixel: draw the object in white"),
        (lambda mask: WHITE, "is all white, so no background is left"),
        (lambda mask: 255 - mask, "is white along its whole border: invert it"),
        (lambda mask: mask // 255 * 100, "has no white pixel .brightest value 100"),
        (lambda mask: mask[:32], r"\(64, 32\), its picture"),
        (lambda mask: np.dstack([BLACK, BLACK, BLACK, mask]), "marks in its alpha channel"),
    ],
)
def test_object_masks_are_judged_alike_for_drawing_and_training(
    spoil: Callable[[np.ndarray], np.ndarray], message: str, tmp_path: Path
) -> None:
    root = write_data(tmp_path)
    path = mask_of(root, 0, "object_mask")
    good = mask_of(root, 0, "object_mask", "good")
    with Image.open(path) as mask:
        spoiled = spoil(np.array(mask))
    save(path, spoiled)
    save(good, spoiled)
    options = options_of(background=True, sample_every=1)
    with pytest.raises(SettingsError, match=message):
        cut_out(Background(picture_of(root, 0), spoiled), SIZE, SIZE)
    with pytest.raises(SettingsError, match=message):
        cut_out(Background(picture_of(root, 0), path), SIZE, SIZE)
    with pytest.raises(DataError, match=message):
        find_examples(root, options)
    with pytest.raises(DataError, match=message):
        sheet_backgrounds(root, [], options)


def test_a_photo_and_its_mask_fit_after_they_are_turned(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.full((SIZE, 2 * SIZE, 3), 60, np.uint8)
    shown[10:20, 100:110] = (200, 100, 0)
    mask = np.where(shown[..., 0] == 200, np.uint8(255), np.uint8(0))
    turned = Image.fromarray(shown).transpose(Image.Transpose.ROTATE_90)
    turned.save(picture_of(root, 0), exif=exif)
    save(mask_of(root, 0), mask)
    sample = find_real(root)[0]
    assert np.array_equal(sample.pixels(), shown)
    assert np.array_equal(sample.flags(), mask > 0)
    # a mask drawn on the stored pixels does not fit
    save(mask_of(root, 0), np.rot90(mask))
    with pytest.raises(DataError, match=r"mask has size \(64, 128\), its picture \(128, 64\)"):
        find_examples(root, options_of())
