"""Defects: what each kind does to a scene, and where.

Every defect is brighter than black in at least one channel, as the anomaly picture shows it alone
on black and its mask is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import cv2
import numpy as np

from dualdiff_engine.demo.factory.fields import (
    FINE,
    OVERSAMPLING,
    SIZE,
    Floats,
    blend,
    blurred,
    noise,
    rotated,
    shifted,
    step,
)
from dualdiff_engine.demo.factory.parts import Scene

Generator = np.random.Generator
# scene -> (color [FINE, FINE, 3] with the defect, share of it in every pixel [FINE, FINE])
Defect = Callable[[Generator, Scene], tuple[Floats, Floats]]

_BODY = (0.80, 0.45, 0.27)


def _spot(rng: Generator, scene: Scene, margin: float) -> tuple[float, float]:
    """A random place in pixels, at least `margin` inside the object and 12 inside the picture."""
    inside = scene.across[::OVERSAMPLING, ::OVERSAMPLING] > margin
    inside[:12], inside[-12:], inside[:, :12], inside[:, -12:] = False, False, False, False
    rows, columns = np.nonzero(inside)
    chosen = rng.integers(len(rows))
    return float(columns[chosen]), float(rows[chosen])


def _blob(rng: Generator, center: tuple[float, float], radius: float, rough: float) -> Floats:
    """Signed distance in pixels, roughly, of an irregular blob: positive inside."""
    x, y = rotated(center, rng.uniform(0, np.pi))
    stretch = rng.uniform(0.75, 1.3)
    distance = np.hypot(x * stretch, y / stretch)
    wobble = rough * radius * (0.28 * noise(rng, radius * 0.9) + 0.1 * noise(rng, radius * 0.35))
    return (radius - distance + wobble).astype(np.float32)


def _strokes(lines: list[np.ndarray], widths: list[float]) -> Floats:
    """Polylines [n, 2] in pixels, tapered, as coverage."""
    canvas = np.zeros((FINE, FINE), np.uint8)
    for line, width in zip(lines, widths, strict=True):
        points = np.round(line * OVERSAMPLING * 16).astype(np.int32)
        for index, (a, b) in enumerate(pairwise(points)):
            place = (index + 0.5) / (len(points) - 1)
            taper = min(1.0, 0.55 + 4 * place * (1 - place))
            thick = max(round(width * taper * OVERSAMPLING), 1)
            cv2.line(canvas, tuple(map(int, a)), tuple(map(int, b)), 255, thick, cv2.LINE_AA, 4)
    return (canvas / 255).astype(np.float32)


def scratch(rng: Generator, scene: Scene) -> tuple[Floats, Floats]:
    """Three gouges side by side through the coating, to bright metal with a burr."""
    x, y = _spot(rng, scene, 8)
    heading = rng.uniform(-np.pi, np.pi)
    along = np.array([np.cos(heading), np.sin(heading)])
    aside = np.array([-along[1], along[0]])
    lines: list[np.ndarray] = []
    widths: list[float] = []
    for number in range(3):
        length, bend = rng.uniform(42, 64), rng.uniform(-5, 5)
        t = np.linspace(-0.5, 0.5, 12)[:, None]
        offset = aside * ((number - 1) * rng.uniform(6.5, 9)) + along * rng.normal(0, 5)
        middle = np.array([x, y]) + offset
        lines.append(middle + along * length * t + aside * bend * (1 - 4 * t**2))
        widths.append(rng.uniform(3.8, 5.0))
    share = _strokes(lines, widths)
    side = blurred(share, 0.8)
    # the wall that faces the light is bright, the other one in shade
    slope = shifted(side, scene.toward, 1.2) - shifted(side, scene.toward + np.pi, 1.2)
    metal = np.asarray((0.90, 0.91, 0.94), np.float32) * (1 - 0.45 * slope)[..., None]
    return (metal * scene.light[..., None]).astype(np.float32), share * step(scene.across, 1)


def stain(rng: Generator, scene: Scene) -> tuple[Floats, Floats]:
    """A rust-coloured liquid dried in: darker rim, the part's own relief shows through."""
    center, radius = _spot(rng, scene, 9), rng.uniform(17, 22)
    inside = _blob(rng, center, radius, 1.0)
    share = step(inside, 0, 1.5) * step(scene.across, 0.5)
    tint = np.asarray((0.86, 0.46, 0.12), np.float32) + rng.uniform(-0.04, 0.04, 3)
    # rings of drying, and blotches
    tone = 1 - 0.28 * np.exp(-((inside - 1.5) ** 2) / 3) + 0.10 * noise(rng, 7, 2)
    grey = scene.color.mean(axis=2)
    relief = 0.78 + 0.35 * (grey - blurred(grey, 10)) / np.maximum(blurred(grey, 10), 0.1)
    color = tint * (tone * relief * 1.2)[..., None] * scene.light[..., None]
    return color.astype(np.float32), share.astype(np.float32)


def hole(rng: Generator, scene: Scene) -> tuple[Floats, Floats]:
    """Torn through to the padding below, with ends of yarn around it."""
    center, radius = _spot(rng, scene, 0), rng.uniform(14, 19)
    center = (np.clip(center[0], 24, SIZE - 24), np.clip(center[1], 24, SIZE - 24))
    inside = _blob(rng, center, radius, 0.8)
    opening = step(inside, 0, 1.0)
    padding = np.asarray((0.95, 0.84, 0.58), np.float32) * (1 + 0.05 * noise(rng, 5, 2))[..., None]
    # the cloth lies above and throws its shadow into the hole
    shade = 0.45 * blurred(shifted(1 - opening, scene.toward + np.pi, 3.0), 1.2)
    color = padding * (1 - shade)[..., None]
    yarn = np.percentile(scene.color.reshape(-1, 3), 85, axis=0)
    lines = []
    for _ in range(rng.integers(7, 11)):
        angle = rng.uniform(-np.pi, np.pi)
        out = np.array([np.cos(angle), np.sin(angle)])
        reach = np.array([radius * rng.uniform(0.55, 0.8), radius * rng.uniform(1.0, 1.2)])
        lines.append(np.asarray(center) + reach[:, None] * out + rng.normal(0, 1.5, (2, 2)))
    ends = _strokes(lines, [rng.uniform(1.4, 2.2) for _ in lines])
    color = blend(color, 0.35 + 0.65 * yarn, ends)
    return (color * scene.light[..., None]).astype(np.float32), np.maximum(opening, ends * 0.9)


def _walk(rng: Generator, start: np.ndarray, heading: float, length: float) -> np.ndarray:
    """A crack's path: straight runs that turn a little."""
    points = [start]
    for _ in range(max(int(length / 5), 2)):
        heading += rng.normal(0, 0.33)
        points.append(points[-1] + 5 * np.array([np.cos(heading), np.sin(heading)]))
    return np.array(points)


def crack(rng: Generator, scene: Scene) -> tuple[Floats, Floats]:
    """Branches from one point through the glaze; the clay body shows between lifted edges."""
    start = np.array(_spot(rng, scene, 14))
    heading = rng.uniform(-np.pi, np.pi)
    lines: list[np.ndarray] = []
    widths: list[float] = []
    for turn in (0.0, 2.3 + rng.normal(0, 0.25), -2.1 + rng.normal(0, 0.25)):
        line = _walk(rng, start, heading + turn, rng.uniform(30, 52))
        lines.append(line)
        widths.append(rng.uniform(3.4, 4.4))
        if rng.random() < 0.5:
            branch = _walk(rng, line[len(line) // 2], heading + turn + rng.choice((-1, 1)), 16)
            lines.append(branch)
            widths.append(rng.uniform(2.4, 3.0))
    share = _strokes(lines, widths)
    side = blurred(share, 0.8)
    slope = shifted(side, scene.toward, 1.0) - shifted(side, scene.toward + np.pi, 1.0)
    clay = np.asarray(_BODY, np.float32) * (0.86 - 0.5 * slope)[..., None]
    return (clay * scene.light[..., None]).astype(np.float32), share * step(scene.across, 0.5)


def chip(rng: Generator, scene: Scene) -> tuple[Floats, Floats]:
    """Broken off at an edge, to clay or copper: shell-shaped ripples, a bright rim of the coat."""
    band = scene.across[::OVERSAMPLING, ::OVERSAMPLING]
    rows, columns = np.nonzero((band > 3) & (band < 7))
    chosen = rng.integers(len(rows))
    inside = _blob(rng, (float(columns[chosen]), float(rows[chosen])), rng.uniform(19, 25), 0.6)
    share = step(inside, 0, 1.0) * step(scene.across, 0.0)
    ripples = np.sin(inside * rng.uniform(0.7, 0.95) + noise(rng, 16))
    tone = 0.95 + 0.13 * ripples + 0.04 * noise(rng, 3)
    clay = np.asarray(_BODY, np.float32) * tone[..., None]
    color = blend(clay.astype(np.float32), (0.97, 0.90, 0.80), step(2.4 - inside, 0, 1.2))
    return (color * scene.light[..., None]).astype(np.float32), share


# which defects a part may have
DEFECTS: dict[str, dict[str, Defect]] = {
    "washer": {"scratch": scratch, "stain": stain, "chip": chip},
    "fabric": {"hole": hole, "stain": stain},
    "tile": {"crack": crack, "chip": chip, "stain": stain},
}
