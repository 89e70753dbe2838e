"""Where a defect goes when nobody draws it: regions sampled on the object, like training masks.

Pure functions of arrays and a seed. The defect's sizes, shapes and numbers come from
`region_statistics`; the object comes from a mask, or from `find_object`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pictures import open_picture
from dualdiff_engine.settings import require_seed

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

# of a mask's area: smaller parts are crumbs of a defect, not defects
_LEAST_SHARE = 0.05
# deviation of the logarithm of a sampled area: between the training masks, not only copies of them
_AREA_SPREAD = 0.2
# of the outline's harmonics, as a share of the radius: dented, and still star-shaped
_DENTS = {2: 0.10, 3: 0.10, 4: 0.06, 5: 0.04}
_CORNERS = 96
# tries to place a part with so much of it on the object; then the best one is taken
_TRIES, _ON_OBJECT = 60, 0.8

# Otsu's measure: the share of the variance between the two classes. 0.75 is that of one uniform
# distribution cut in the middle, which has no two classes
_SEPARABLE = 0.8
_LEAST_OBJECT, _MOST_OBJECT = 0.01, 0.95
# an object is rarer on the border than inside; a texture is as frequent
_MOST_BORDER = 0.5
# of the picture's shorter side: gaps that a highlight or a pattern leaves are closed
_GAP = 1 / 20
# of the largest part: smaller ones are dust
_LEAST_PART = 0.05


@dataclass(frozen=True)
class RegionStatistics:
    """Sizes, shapes and numbers of defects, as measured by `region_statistics`.

    parts: (area, elongation) per connected part; area as a fraction of the picture in (0, 1),
    elongation as the ratio of the axes of the ellipse of equal second moments, at least 1. counts:
    parts per mask. Raises SettingsError for other values.
    """

    parts: tuple[tuple[float, float], ...]
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        sound = all(0 < area < 1 and 1 <= elongation < 1e6 for area, elongation in self.parts)
        if not (self.parts and self.counts and sound and min(self.counts) >= 1):
            raise SettingsError(
                "RegionStatistics need (area in (0, 1), elongation >= 1) per part and a count >= 1 "
                "per mask: make them with region_statistics(masks)"
            )

    def record(self) -> dict[str, Any]:
        """JSON-ready, for a recipe."""
        return {"parts": [list(part) for part in self.parts], "counts": list(self.counts)}


def region_statistics(masks: Iterable[Any]) -> RegionStatistics:
    """Measure the parts of masks (paths, PIL images or arrays; the defect in white).

    Parts below 5 % of their mask's area do not count. Raises SettingsError when no mask holds a
    defect, or one cannot be read.
    """
    parts, counts = [], []
    for number, mask in enumerate(masks):
        white = np.asarray(open_picture(mask, f"mask {number}", "L")) > 127
        _, labels, stats, _ = cv2.connectedComponentsWithStats(white.astype(np.uint8))
        areas = stats[1:, cv2.CC_STAT_AREA]
        large = [n for n, area in enumerate(areas, 1) if area >= _LEAST_SHARE * areas.sum()]
        # a full mask is no defect's
        if not large or white.all():
            continue
        counts.append(len(large))
        for part in large:
            area = round(float(stats[part, cv2.CC_STAT_AREA] / white.size), 8)
            parts.append((area, round(_elongation(labels == part), 4)))
    if not parts:
        raise SettingsError("no mask holds a defect in white: pass the masks of the training data")
    return RegionStatistics(tuple(parts), tuple(counts))


def _elongation(part: Flags) -> float:
    rows, columns = np.nonzero(part)
    if rows.size < 2:
        return 1.0
    # 1/12: the variance within a pixel, which keeps lines of one pixel finite
    spread = np.cov(np.stack([rows, columns]), bias=True) + np.eye(2) / 12
    low, high = np.linalg.eigvalsh(spread)
    return float(max(1.0, math.sqrt(high / low)))


def sample_region(
    object_mask: Any, statistics: RegionStatistics, seed: int, *, least: int = 64
) -> Bytes:
    """Draw a region on an object: dented ellipses of the statistics' areas and elongations.

    Args:
        object_mask: bool or uint8 [H, W], the object in white.
        statistics: of the defect.
        seed: 0 to 2^63-1; the region is a function of the three.
        least: pixels that the region has at least, where the object is that large.

    Returns:
        uint8 [H, W], 255 in the region, which lies on the object, and 0 elsewhere.

    Raises:
        SettingsError: The object mask has no white pixel, or the seed is out of range.
    """
    on_object = np.asarray(object_mask)
    on_object = on_object if on_object.dtype == np.bool_ else on_object > 127
    if on_object.ndim != 2 or not on_object.any():
        raise SettingsError("the object mask has no white pixel: draw the object in white")
    # another purpose, another stream: not the one of the pair's noise
    draw = np.random.default_rng([*b"region", require_seed(seed)])
    region = np.zeros(on_object.shape, np.bool_)
    for _ in range(int(draw.choice(statistics.counts))):
        area, elongation = statistics.parts[int(draw.integers(len(statistics.parts)))]
        area *= math.exp(_AREA_SPREAD * draw.standard_normal())
        outline = _outline(max(area * region.size, least), elongation, draw)
        region |= _placed(outline, on_object, draw)
    if np.count_nonzero(region) < least:
        region |= _disc(on_object, least)
    return np.where(region, np.uint8(255), np.uint8(0))


def _outline(area: float, elongation: float, draw: np.random.Generator) -> NDArray[np.float64]:
    """Corners [n, 2] (x, y) in pixels around 0 of a dented ellipse at a random angle."""
    angle = np.linspace(0, 2 * math.pi, _CORNERS, endpoint=False)
    radius = np.ones_like(angle)
    for harmonic, share in _DENTS.items():
        strength, phase = share * draw.standard_normal(), draw.uniform(0, 2 * math.pi)
        radius += np.clip(strength, -2 * share, 2 * share) * np.cos(harmonic * angle + phase)
    stretch = math.sqrt(elongation)
    x, y = radius * np.cos(angle) * stretch, radius * np.sin(angle) / stretch
    turn = draw.uniform(0, math.pi)
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    # the shoelace formula: the dents change the area
    own = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return np.stack([x, y], axis=1) * math.sqrt(area / own)


def _placed(outline: NDArray[np.float64], on_object: Flags, draw: np.random.Generator) -> Flags:
    """The part of an outline that is on the object, at the place where most of it is."""
    rows, columns = np.nonzero(on_object)
    best, most = np.zeros_like(on_object), -1.0
    for _ in range(_TRIES):
        centre = int(draw.integers(rows.size))
        shift = np.array([columns[centre], rows[centre]])
        corners = np.round(outline + shift).astype(np.int32)
        canvas = np.zeros(on_object.shape, np.uint8)
        # the filled area of a polygon's corners is the area it has without the picture's edges
        cv2.fillPoly(canvas, [corners], (1,))
        part = (canvas > 0) & on_object
        share = np.count_nonzero(part) / max(1.0, float(cv2.contourArea(corners)))
        if share > most:
            best, most = part, share
        if share >= _ON_OBJECT:
            break
    return best


def _disc(on_object: Flags, least: int) -> Flags:
    """A disc of at least so many pixels around the object's innermost pixel, object or not."""
    padded = np.pad(on_object.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    radius = math.sqrt(least / math.pi) + 1
    y, x = np.ogrid[: on_object.shape[0], : on_object.shape[1]]
    return np.asarray((y - row) ** 2 + (x - column) ** 2 <= radius**2)


def find_object(picture: Bytes) -> Flags:
    """The object on a plain ground: pixels whose colour is far from the border's (Otsu 1979).

    Args:
        picture: uint8 [H, W, 3], RGB.

    Returns:
        bool [H, W].

    Raises:
        SettingsError: It is not sure: colours do not form two groups, or what was found covers
            nearly nothing, nearly everything or much of the border. The message gives the reason.
    """
    colour = cv2.cvtColor(cv2.GaussianBlur(picture, (0, 0), 1.0), cv2.COLOR_RGB2LAB)
    rim = np.concatenate([colour[0], colour[-1], colour[:, 0], colour[:, -1]])
    ground = np.median(rim.astype(np.float32), axis=0)
    distance = np.linalg.norm(colour.astype(np.float32) - ground, axis=2)
    scaled = np.round(distance / max(float(distance.max()), 1.0) * 255).astype(np.uint8)
    cut, found = cv2.threshold(scaled, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    side = max(3, round(min(found.shape) * _GAP)) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    found = _without_dust(np.asarray(cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel)) > 0)
    if reason := _unsure(scaled, cut, found):
        raise SettingsError(
            f"the object was not found for sure ({reason}): pass object_mask, or "
            "object_mask='all' for a texture"
        )
    return found


def _without_dust(found: Flags) -> Flags:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found.astype(np.uint8))
    areas = stats[1:, cv2.CC_STAT_AREA]
    if not areas.size:
        return found
    return np.isin(labels, 1 + np.flatnonzero(areas >= _LEAST_PART * areas.max()))


def _unsure(scaled: Bytes, cut: float, found: Flags) -> str | None:
    """Why a found object may be wrong."""
    share, values = float(found.mean()), scaled.astype(np.float64)
    if not _LEAST_OBJECT <= share <= _MOST_OBJECT:
        return f"it would cover {share:.1%} of the picture"
    above = values > cut
    between = (
        above.mean() * (1 - above.mean()) * (values[above].mean() - values[~above].mean()) ** 2
    )
    if between < _SEPARABLE * values.var():
        return "object and ground do not differ enough in colour"
    rim = np.concatenate([found[0], found[-1], found[:, 0], found[:, -1]])
    if rim.mean() > _MOST_BORDER * share:
        return f"it would cover {rim.mean():.0%} of the picture's border"
    return None
