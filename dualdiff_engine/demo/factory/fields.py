"""Smooth random fields and coordinates, the raw material of every procedural picture."""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Bytes = NDArray[np.uint8]
Color = tuple[float, float, float]

# pixels of a finished picture, and of the finer raster that it is drawn on
SIZE = 128
OVERSAMPLING = 2
FINE = SIZE * OVERSAMPLING


@cache
def _pixels() -> tuple[Floats, Floats]:
    y, x = np.mgrid[0:FINE, 0:FINE].astype(np.float32)
    return (x + 0.5) / OVERSAMPLING, (y + 0.5) / OVERSAMPLING


def rotated(center: tuple[float, float], angle: float) -> tuple[Floats, Floats]:
    """Coordinates [FINE, FINE] in pixels of the finished picture, around a center, rotated."""
    x, y = _pixels()
    x, y = x - center[0], y - center[1]
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def noise(rng: np.random.Generator, scale: float, octaves: int = 1) -> Floats:
    """Smooth noise [FINE, FINE] of about unit deviation; scale: pixels between its knots.

    Value noise: a coarse grid of normal draws, interpolated by cubics; each octave halves scale
    and amplitude.
    """
    total = np.zeros((FINE, FINE), np.float32)
    for octave in range(octaves):
        knots = max(int(np.ceil(SIZE * 2**octave / scale)), 1) + 3
        grid = rng.standard_normal((knots, knots)).astype(np.float32)
        step = FINE * (scale / 2**octave) / SIZE
        # knots lie `step` apart; one more on each side keeps the border's interpolation honest
        spread = round(knots * step)
        whole = cv2.resize(grid, (spread, spread), interpolation=cv2.INTER_CUBIC)
        start = int(step)
        total += whole[start : start + FINE, start : start + FINE] / 2**octave
    return total


def profile(rng: np.random.Generator, positions: Floats, scale: float) -> Floats:
    """Noise along one coordinate: brush lines, grain; positions in pixels."""
    draws = rng.standard_normal(int(4 * SIZE / scale)).astype(np.float32)
    knots = np.arange(len(draws), dtype=np.float32) * scale - SIZE
    return np.interp(positions, knots, draws).astype(np.float32)


def step(field: Floats, edge: float = 0.0, width: float = 1.0) -> Floats:
    """0 below the edge, 1 above, linear over `width` around it."""
    return np.clip((field - edge) / width + 0.5, 0, 1).astype(np.float32)


def blend(below: Floats, above: Floats | Color, share: Floats) -> Floats:
    """Pictures [H, W, 3] mixed by `share` [H, W]."""
    over = np.asarray(above, np.float32)
    return (below + share[..., None] * (over - below)).astype(np.float32)


def shifted(field: Floats, angle: float, pixels: float) -> Floats:
    """The field moved by a distance in a direction; what comes in is 0."""
    by = pixels * OVERSAMPLING
    move = np.array([[1, 0, by * np.cos(angle)], [0, 1, by * np.sin(angle)]], np.float32)
    return np.asarray(cv2.warpAffine(field, move, (FINE, FINE)), np.float32)


def blurred(field: Floats, pixels: float) -> Floats:
    return np.asarray(cv2.GaussianBlur(field, (0, 0), pixels * OVERSAMPLING), np.float32)


def reduced(field: Floats) -> Floats:
    """[FINE, FINE, …] -> [SIZE, SIZE, …] by averaging."""
    return np.asarray(cv2.resize(field, (SIZE, SIZE), interpolation=cv2.INTER_AREA), np.float32)
