"""Synthetic anomaly pictures with known masks, and the score of the mask extractor on them.

Run ``python bench/synthetic_masks.py [--count N] [--seed S] [--output-json FILE]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dualdiff_engine.pipeline.masks import extract_mask

SIZES = (512, 256)
# shapes are drawn this many times larger and averaged down, which gives exact antialiased edges
SUPERSAMPLING = 4

# [size, size] in [0, 1]: the part of each pixel that a defect covers
Coverage = NDArray[np.float32]
# [size, size, 3] in grey levels, RGB
Paint = NDArray[np.float32]
Row = dict[str, str | int | float]


@dataclass(frozen=True)
class SyntheticSample:
    """One synthetic anomaly picture.

    Attributes:
        picture: uint8 [size, size, 3] RGB, a defect on a near-black background.
        mask: uint8 [size, size], 255 where the defect covers at least half of the pixel, else 0.
    """

    picture: NDArray[np.uint8]
    mask: NDArray[np.uint8]


def _smooth_field(rng: np.random.Generator, size: int, spacing: float) -> NDArray[np.float32]:
    """Random field [size, size], mean 0, deviation 1, smooth between nodes `spacing` px apart."""
    nodes = rng.standard_normal((round(size / spacing), round(size / spacing)))
    field = cv2.resize(nodes, (size, size), interpolation=cv2.INTER_CUBIC)
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _draw(size: int, points: NDArray[np.float64], width: float | None = None) -> Coverage:
    """Coverage [size, size] in [0, 1] of a polygon, or of an open line `width` pixels wide."""
    canvas = np.zeros((size * SUPERSAMPLING, size * SUPERSAMPLING), np.uint8)
    corners = np.rint(points * SUPERSAMPLING).astype(np.int32)
    if width is None:
        cv2.fillPoly(canvas, [corners], 255)
    else:
        cv2.polylines(canvas, [corners], False, 255, round(width * SUPERSAMPLING))
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    return (small / 255).astype(np.float32)


def _blob(
    rng: np.random.Generator,
    size: int,
    radius: tuple[float, float] = (0.06, 0.22),
    centre: tuple[float, float] | None = None,
) -> Coverage:
    """One smooth closed shape; `radius` bounds and `centre` are fractions of the picture."""
    angle = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    distance = np.ones_like(angle)
    for order in range(1, 13):
        amplitude, phase = rng.uniform(0, 0.3) / order, rng.uniform(0, 2 * np.pi)
        distance += amplitude * np.cos(order * angle + phase)
    distance *= rng.uniform(*radius) * size
    middle = np.array(centre if centre else rng.uniform(0.3, 0.7, 2)) * size
    return _draw(size, middle + distance[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))


def _small_blob(rng: np.random.Generator, size: int) -> Coverage:
    return _blob(rng, size, (0.03, 0.1), (rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9)))


def _border_blob(rng: np.random.Generator, size: int) -> Coverage:
    across, along = rng.integers(2) + rng.uniform(-0.03, 0.03), rng.uniform(0.2, 0.8)
    centre = (across, along) if rng.random() < 0.5 else (along, across)
    return _blob(rng, size, (0.08, 0.22), centre)


def _scratch(rng: np.random.Generator, size: int) -> Coverage:
    """One curved line, 2 to 6 pixels wide at every picture size."""
    first, bend, last = rng.uniform(0.1, 0.9, (3, 2)) * size
    position = np.linspace(0, 1, 64)[:, None]
    curve = first * (1 - position) ** 2 + 2 * bend * position * (1 - position) + last * position**2
    return _draw(size, curve, rng.uniform(2, 6))


def _grey_paint(rng: np.random.Generator, size: int, low: float, high: float) -> Paint:
    """A slightly tinted and shaded surface whose mean brightness lies in [low, high]."""
    tint = rng.uniform(0.85, 1.0, 3)
    shade = 1 + 0.12 * _smooth_field(rng, size, size / 4) + 0.04 * _smooth_field(rng, size, 3)
    paint = rng.uniform(low, high) * shade[..., None] * tint / tint.mean()
    return paint.astype(np.float32)


def _normal_paint(rng: np.random.Generator, size: int) -> Paint:
    return _grey_paint(rng, size, 80, 220)


def _dim_paint(rng: np.random.Generator, size: int) -> Paint:
    return _grey_paint(rng, size, 25, 50)


def _coloured_paint(rng: np.random.Generator, size: int) -> Paint:
    """One or two saturated channels; the rest of the light is (almost) missing."""
    channels = rng.permutation([1.0, rng.choice([0.0, 0.7]), rng.uniform(0, 0.1)])
    return _normal_paint(rng, size) * channels.astype(np.float32)


def _textured_paint(rng: np.random.Generator, size: int) -> Paint:
    """A surface that varies by a third of its brightness, with near-black spots."""
    texture = 1 + 0.3 * _smooth_field(rng, size, rng.uniform(5, 12))
    spots = np.zeros((size, size), np.uint8)
    for centre in rng.integers(0, size, (size * size // 1500, 2)):
        cv2.circle(spots, centre.tolist(), int(rng.integers(1, 4)), 255, -1, cv2.LINE_AA)
    surface = np.clip(texture, 0.3, None) * (1 - 0.92 * spots / 255)
    return _grey_paint(rng, size, 90, 220) * surface[..., None].astype(np.float32)


@dataclass(frozen=True)
class Family:
    """How the samples of a family are made: shape and surface of a defect, bounds (both
    included) of the number of defects, bounds of the noise's deviation in grey levels."""

    shape: Callable[[np.random.Generator, int], Coverage]
    paint: Callable[[np.random.Generator, int], Paint]
    defects: tuple[int, int] = (1, 1)
    noise: tuple[float, float] = (1.0, 4.0)


FAMILIES = {
    "blob": Family(_blob, _normal_paint),
    "scratch": Family(_scratch, _normal_paint, defects=(1, 3)),
    "low-contrast": Family(_blob, _dim_paint, noise=(2.5, 3.5)),
    "noise": Family(_blob, _normal_paint, noise=(10.0, 12.0)),
    "texture": Family(_blob, _textured_paint),
    "multi": Family(_small_blob, _normal_paint, defects=(2, 5)),
    "coloured": Family(_blob, _coloured_paint),
    "border": Family(_border_blob, _normal_paint),
}


def _degrade(rng: np.random.Generator, clean: Paint, noise: float) -> NDArray[np.uint8]:
    """The decoder's softness and ringing, its blotches, grey or coloured noise; half are JPEG."""
    size = clean.shape[0]
    soft = cv2.GaussianBlur(clean, (0, 0), rng.uniform(0.3, 0.8))
    ringing = rng.uniform(0, 0.25) * (soft - cv2.GaussianBlur(soft, (0, 0), 2.0))
    blotches = rng.uniform(0, 0.4) * noise * _smooth_field(rng, size, 8)[..., None]
    grain = rng.normal(0, noise, (size, size, rng.choice([1, 3])))
    picture = np.clip(np.rint(soft + ringing + blotches + grain), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        return picture
    quality = int(rng.integers(80, 99))
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(decoded[..., ::-1])


def make_sample(family: str, size: int, seed: int, index: int = 0) -> SyntheticSample:
    """Sample `index` of a family; the same arguments always give the same sample.

    Args:
        family: a key of FAMILIES.
        size: side of the picture in pixels.
        seed: any non-negative number.
        index: number of the sample within the family and the size.

    Raises:
        KeyError: the family is unknown.
    """
    recipe = FAMILIES[family]
    rng = np.random.default_rng([seed, list(FAMILIES).index(family), size, index])
    clean = np.full((size, size, 3), rng.uniform(0, 6), np.float32)
    mask = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(*recipe.defects, endpoint=True)):
        coverage = recipe.shape(rng, size)
        clean += coverage[..., None] * (recipe.paint(rng, size) - clean)
        mask[coverage >= 0.5] = 255
    picture = _degrade(rng, clean, rng.uniform(*recipe.noise))
    return SyntheticSample(picture, mask)


def intersection_over_union(mask: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """|A and B| / |A or B| of two masks of {0, 255}; 1 when both are empty."""
    union = np.count_nonzero(mask | truth)
    return float(np.count_nonzero(mask & truth) / union) if union else 1.0


def score(count_per_family: int, seed: int) -> list[Row]:
    """Score `extract_mask` on every family at every size.

    Args:
        count_per_family: samples for each family and size.
        seed: seed of the samples.

    Returns:
        One row per family and size: family, size, n, mean_iou, p10_iou (10th percentile) and
        empty (number of samples whose defect was missed altogether).
    """
    rows: list[Row] = []
    for family in FAMILIES:
        for size in SIZES:
            overlaps, empty = [], 0
            for index in range(count_per_family):
                sample = make_sample(family, size, seed, index)
                result = extract_mask(sample.picture)
                overlaps.append(intersection_over_union(result.mask, sample.mask))
                empty += result.empty
            row: Row = {"family": family, "size": size, "n": count_per_family}
            row["mean_iou"] = float(np.mean(overlaps))
            row["p10_iou"] = float(np.percentile(overlaps, 10))
            row["empty"] = empty
            rows.append(row)
    return rows


def main() -> None:
    """Print the table of scores; with --output-json also write it."""
    parser = argparse.ArgumentParser(description="score the mask extractor on synthetic pictures")
    parser.add_argument("--count", type=int, default=20, help="samples per family and size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output-json", type=Path)
    arguments = parser.parse_args()
    rows = score(arguments.count, arguments.seed)
    total = float(np.mean([row["mean_iou"] for row in rows]))
    print(f"{'family':14}{'size':>5}{'n':>5}{'mean IoU':>10}{'p10 IoU':>9}{'empty':>7}")
    for row in rows:
        print("{family:14}{size:5}{n:5}{mean_iou:10.4f}{p10_iou:9.4f}{empty:7}".format_map(row))
    print(f"total mean IoU {total:.4f}")
    if arguments.output_json:
        report = {"seed": arguments.seed, "total_mean_iou": total, "rows": rows}
        arguments.output_json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
