"""Regions where nobody drew one: sizes and shapes of real masks, on the object, by the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dualdiff_engine import (
    RegionStatistics,
    SettingsError,
    find_object,
    region_statistics,
    sample_region,
)
from dualdiff_engine.demo.factory import make

SIDE = 256


def ellipse(long: int, short: int, angle: float = 30.0) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    cv2.ellipse(mask, (SIDE // 2, SIDE // 2), (long, short), angle, 0, 360, (255,), -1)
    return mask


def test_statistics_are_those_of_the_parts(tmp_path: Path) -> None:
    two = np.maximum(np.roll(ellipse(30, 10), 60, 0), np.roll(ellipse(20, 20), -60, 0))
    Image.fromarray(two).save(tmp_path / "two.png")
    statistics = region_statistics([ellipse(40, 20), tmp_path / "two.png", np.zeros_like(two)])
    assert statistics.counts == (1, 2)
    areas = [area * SIDE**2 for area, _ in statistics.parts]
    # the rasterised outline adds up to half a pixel around
    for area, expected in zip(sorted(areas), sorted([800, 300, 400]), strict=True):
        assert area == pytest.approx(np.pi * expected, rel=0.08)
    elongations = sorted(elongation for _, elongation in statistics.parts)
    assert elongations == pytest.approx([1.0, 2.0, 3.0], rel=0.06)


def test_crumbs_are_no_defects() -> None:
    mask = ellipse(40, 20)
    mask[3:5, 3:5] = 255
    assert region_statistics([mask]).counts == (1,)


def test_regions_have_the_statistics_of_the_masks() -> None:
    statistics = RegionStatistics(((0.01, 1.2), (0.02, 3.0)), (1, 2))
    everywhere = np.full((SIDE, SIDE), 255, np.uint8)
    drawn = region_statistics(sample_region(everywhere, statistics, seed) for seed in range(200))
    areas, elongations = (np.array(x) for x in zip(*drawn.parts, strict=True))
    # two parts of a region may touch, and edges of the picture cut some: medians
    assert np.median(areas) == pytest.approx(0.015, rel=0.35)
    assert areas.min() > 0.004
    assert areas.max() < 0.08
    assert 1.2 < np.median(elongations) < 3.0
    assert 1.2 < np.mean(drawn.counts) < 1.7


def test_regions_lie_on_the_object() -> None:
    washer = make("washer", seed=1).object_mask
    statistics = region_statistics(make("washer", "chip", seed=n).mask for n in range(4))
    regions = [sample_region(washer, statistics, seed) for seed in range(50)]
    for region in regions:
        assert region.dtype == np.uint8
        assert set(np.unique(region)) == {0, 255}
        assert not region[washer == 0].any()
        assert np.count_nonzero(region) >= 64
    # everywhere on it, not at one place
    covered = np.max(regions, axis=0)[washer > 0]
    assert (covered > 0).mean() > 0.8


def test_a_region_is_a_function_of_its_seed() -> None:
    statistics = RegionStatistics(((0.02, 2.0),), (1,))
    mask = np.full((64, 96), True)
    one, again, other = (sample_region(mask, statistics, seed) for seed in (7, 7, 8))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    sample_region(mask, statistics, 2**63 - 1)


@pytest.mark.parametrize("thin", [1, 3])
def test_an_object_thinner_than_a_latent_pixel_gets_a_region_that_is_not(thin: int) -> None:
    mask = np.zeros((64, 64), bool)
    mask[30 : 30 + thin, 10:50] = True
    region = sample_region(mask, RegionStatistics(((0.001, 1.0),), (1,)), 0)
    assert np.count_nonzero(region) >= 64
    assert (region[mask] > 0).any()


@pytest.mark.parametrize("part", ["washer", "tile"])
def test_objects_on_a_plain_ground_are_found(part: str) -> None:
    shares = []
    for seed in range(8):
        product = make(part, seed=seed)
        try:
            found = find_object(product.good)
        except SettingsError:
            continue
        # a soft shadow on the ground counts as object in part; measured on 16 parts: 0.866 least
        assert product.object_mask[found].mean() > 0.85 * 255
        shares.append(found[product.object_mask > 0].mean())
    assert len(shares) >= 5
    assert np.median(shares) > 0.7


@pytest.mark.parametrize("seed", range(4))
def test_a_texture_is_not_taken_for_an_object(seed: int) -> None:
    with pytest.raises(SettingsError, match=r"not found for sure \(.*\): pass object_mask, or"):
        find_object(make("fabric", seed=seed).good)


def test_what_covers_nothing_or_everything_is_not_sure() -> None:
    for top, side in ((40, 3), (0, 64)):
        picture = np.full((64, 64, 3), 30, np.uint8)
        picture[top : top + side, top : top + side] = 220
        with pytest.raises(SettingsError, match="not found for sure"):
            find_object(picture)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [((), (1,)), (((0.1, 1.0),), ()), (((0.0, 1.0),), (1,)), (((0.1, 0.5),), (1,)),
     (((1.0, 1.0),), (1,)), (((0.1, 1.0),), (0,)), (((float("nan"), 1.0),), (1,))],
)  # fmt: skip
def test_wrong_statistics(parts: Any, counts: Any) -> None:
    with pytest.raises(SettingsError, match="RegionStatistics need"):
        RegionStatistics(parts, counts)


def test_wrong_masks() -> None:
    with pytest.raises(SettingsError, match="no mask holds a defect in white"):
        region_statistics([np.zeros((8, 8), np.uint8)])
    with pytest.raises(SettingsError, match=r"mask 1: no|no\.png is not a file"):
        region_statistics([ellipse(4, 4), "no.png"])
    with pytest.raises(SettingsError, match="object mask has no white pixel"):
        sample_region(np.zeros((8, 8), np.uint8), RegionStatistics(((0.1, 1.0),), (1,)), 0)
