"""The factory's promises: a function of its seed, masks exact to the pixel, the layout on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine.demo.factory.defects import DEFECTS
from dualdiff_engine.demo.factory.parts import PARTS
from dualdiff_engine.demo.factory.samples import LEAST_SHARE, SIZE, make, write_dataset
from dualdiff_engine.demo.train import material
from dualdiff_engine.errors import OutputError, SettingsError

KINDS = [(part, defect) for part, defects in DEFECTS.items() for defect in defects]


@pytest.mark.parametrize(("part", "defect"), KINDS)
def test_mask_is_exact(part: str, defect: str) -> None:
    for seed in range(6):
        product = make(part, defect, seed=seed)
        inside = product.mask > 0
        assert set(np.unique(product.mask)) == {0, 255}
        # outside the mask not one byte differs from the good twin
        assert np.array_equal(product.image[~inside], product.good[~inside])
        assert not product.anomaly[~inside].any()
        # inside it nearly every pixel does; the defect's and the part's colour may meet by chance
        changed = (product.image != product.good).any(axis=2)
        assert changed[inside].mean() > 0.98
        # the smallest cover hundreds of pixels, none the whole picture
        assert 0.01 < inside.mean() < 0.2
        # on the part; a pixel that a defect counts in may hold less of the part than of the ground
        assert (product.object_mask[inside] > 0).mean() > 0.9


@pytest.mark.parametrize(("part", "defect"), KINDS)
def test_defects_can_be_told_from_black(part: str, defect: str) -> None:
    """The engine cuts masks out of anomaly pictures by brightness."""
    from dualdiff_engine.pipeline.masks import extract_mask

    overlaps = []
    for seed in range(4):
        product = make(part, defect, seed=seed)
        found, true = extract_mask(product.anomaly).mask > 0, product.mask > 0
        overlaps.append((found & true).sum() / (found | true).sum())
    assert np.mean(overlaps) > 0.85


@pytest.mark.parametrize("part", PARTS)
def test_same_seed_same_picture_other_seed_other_picture(part: str) -> None:
    defect = next(iter(DEFECTS[part]))
    first, again, other = (make(part, defect, seed=seed) for seed in (7, 7, 8))
    for name in ("image", "good", "mask", "object_mask"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    difference = first.good.astype(int) - other.good
    assert np.abs(difference).mean() > 5
    assert np.array_equal(make(part, seed=7).image, first.good)
    assert first.image.shape == (SIZE, SIZE, 3)
    assert first.image.dtype == np.uint8
    assert 0 < LEAST_SHARE < 0.5


def test_object_masks_leave_surroundings_of_objects_only() -> None:
    assert (make("fabric", seed=1).object_mask == 255).all()
    for part in ("washer", "tile"):
        assert 0.2 < (make(part, seed=1).object_mask > 0).mean() < 0.8


def test_dataset_has_the_layout_that_training_reads(tmp_path: Path) -> None:
    write_dataset(tmp_path, "tile", ["crack", "chip"], good=4, defective=2, seed=3)
    files = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png")}
    expected = {f"train/good/{n:03d}.png" for n in range(4)} | {"test/good/000.png"}
    expected |= {f"object_mask/good/{n:03d}_mask.png" for n in range(4)}
    for defect in ("crack", "chip"):
        expected |= {f"test/{defect}/{n:03d}.png" for n in range(2)}
        expected |= {f"{k}/{defect}/{n:03d}_mask.png" for k in ("ground_truth", "object_mask")
                     for n in range(2)}  # fmt: skip
    assert files == expected
    picture = Image.open(tmp_path / "test/crack/001.png")
    mask = Image.open(tmp_path / "ground_truth/crack/001_mask.png")
    assert (picture.mode, picture.size, mask.mode) == ("RGB", (SIZE, SIZE), "L")
    pictures = [p.read_bytes() for p in tmp_path.glob("t*/*/*.png")]
    assert len(set(pictures)) == len(pictures)
    with pytest.raises(OutputError, match="already holds a data set"):
        write_dataset(tmp_path, "tile", ["crack"], good=1, defective=1)


def test_unknown_names_are_told() -> None:
    with pytest.raises(SettingsError, match="no part 'gear': choose one of washer"):
        make("gear", seed=0)
    with pytest.raises(
        SettingsError, match="no defect 'hole' of washer: choose one of scratch, stain"
    ):
        make("washer", "hole", seed=0)
    with pytest.raises(SettingsError, match="seed"):
        make("washer", seed=-1)


def test_the_base_never_sees_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def spy(part: str, defect: str | None = None, *, seed: int) -> object:
        asked.append(defect)
        return make(part, defect, seed=seed)

    monkeypatch.setattr(material, "make", spy)
    pictures = material.good_pictures(12, 0)
    assert set(asked) == {None}
    assert {prompt.split()[1] for _, prompt in pictures} == {*PARTS, "piece"}
    assert {prompt.count("piece") for _, prompt in pictures} == {0, 1}
    pieces = [picture for picture, prompt in pictures if prompt.startswith("a piece")]
    assert 0 < len(pieces) < len(asked) - len(pictures) + len(pieces)
    assert all((picture == 0).all(axis=2).mean() > 0.3 for picture in pieces)
    assert len(material.any_pictures(5, 1)) == 5
