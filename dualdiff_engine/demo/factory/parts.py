"""Good parts: an anodised washer on a mat, a woven fabric, a glazed tile on boards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dualdiff_engine.demo.factory.fields import (
    FINE,
    SIZE,
    Color,
    Floats,
    blend,
    blurred,
    noise,
    profile,
    rotated,
    shifted,
    step,
)

Generator = np.random.Generator


@dataclass(frozen=True)
class Scene:
    """A part before a camera looks at it; fields are [FINE, FINE].

    color: [FINE, FINE, 3], lit, in [0, 1] and display space. light: how much falls where, around
    1; what a defect brings is lit by it. coverage: the object, 1 inside; all 1 for a texture.
    across: signed distance in pixels from the object's nearest edge, positive inside.
    toward: the direction that light comes from, in radians.
    """

    color: Floats
    light: Floats
    coverage: Floats
    across: Floats
    toward: float


def _jittered(rng: Generator, color: Color, amount: float = 0.04) -> Floats:
    return np.clip(np.asarray(color) + rng.uniform(-amount, amount, 3), 0, 1).astype(np.float32)


def _pick(rng: Generator, colors: tuple[Color, ...]) -> Floats:
    return _jittered(rng, colors[rng.integers(len(colors))])


def _lamp(rng: Generator) -> float:
    """Above the picture, up to a radian to either side."""
    return float(rng.uniform(-1, 1) - np.pi / 2)


def _light(rng: Generator, toward: float) -> Floats:
    """A lamp at one side, its exposure, and the lens' darker corners."""
    x, y = rotated((SIZE / 2, SIZE / 2), toward)
    exposure, slope = rng.uniform(0.92, 1.06), rng.uniform(0.04, 0.16)
    distance = (x**2 + y**2) / SIZE**2
    return (exposure * (1 + slope * 2 * x / SIZE) * (1 - 0.18 * distance)).astype(np.float32)


def _shadowed(ground: Floats, coverage: Floats, toward: float, rng: Generator) -> Floats:
    length, depth = rng.uniform(3, 6), rng.uniform(0.35, 0.5)
    shadow = blurred(shifted(coverage, toward + np.pi, length), 2.0)
    return (ground * (1 - depth * shadow[..., None])).astype(np.float32)


_METALS = ((0.20, 0.36, 0.72), (0.45, 0.47, 0.52))
_MATS = ((0.86, 0.78, 0.60), (0.78, 0.80, 0.80))


def washer(rng: Generator) -> Scene:
    """An anodised ring with turning marks on a felt mat."""
    toward = _lamp(rng)
    center = (SIZE / 2 + rng.uniform(-6, 6), SIZE / 2 + rng.uniform(-6, 6))
    outer = rng.uniform(46, 55)
    inner = outer * rng.uniform(0.36, 0.46)
    light = _light(rng, toward)
    mat = _pick(rng, _MATS) * (1 + 0.03 * noise(rng, 14, 2) + 0.02 * noise(rng, 1.5))[..., None]

    x, y = rotated(center, toward)
    radius = np.hypot(x, y)
    across = np.minimum(outer - radius, radius - inner).astype(np.float32)
    coverage = step(across)
    # turned metal shines in two opposite sectors (anisotropic highlight of a lathe-cut face)
    angle = np.arctan2(y, x)
    shine = np.abs(np.cos(angle)) ** rng.uniform(3, 7) * np.where(np.cos(angle) > 0, 1, 0.6)
    marks = profile(rng, radius, 2.5)
    metal = _pick(rng, _METALS) * (0.82 + 0.05 * marks)[..., None]
    metal = metal + (0.34 * shine * (1 + 0.15 * marks))[..., None]
    # chamfers: the outer one faces the light where the inner one turns away
    outward = np.where(outer - radius < radius - inner, 1, -1) * np.cos(angle)
    metal = metal + (0.22 * outward * step(3.2 - across, 0, 1.5))[..., None]

    color = blend(_shadowed(mat, coverage, toward, rng), metal, coverage)
    return Scene((color * light[..., None]).astype(np.float32), light, coverage, across, toward)


_YARNS: tuple[tuple[Color, Color], ...] = (
    ((0.10, 0.42, 0.42), (0.55, 0.78, 0.72)),
    ((0.24, 0.25, 0.30), (0.58, 0.60, 0.64)),
)


def fabric(rng: Generator) -> Scene:
    """A plain weave of two yarns that fills the picture."""
    toward = _lamp(rng)
    light = _light(rng, toward)
    pitch = rng.uniform(7.5, 9.5)
    u, v = rotated((rng.uniform(0, pitch) * 2, rng.uniform(0, pitch) * 2), rng.uniform(-0.2, 0.2))
    u = (u + 0.8 * noise(rng, 48)) / pitch
    v = (v + 0.8 * noise(rng, 48)) / pitch
    warp_on_top = (np.floor(u) + np.floor(v)) % 2 == 0
    du, dv = u - np.floor(u) - 0.5, v - np.floor(v) - 0.5
    over, along = np.where(warp_on_top, du, dv), np.where(warp_on_top, dv, du)
    # a yarn is round across and dives under its neighbours at both ends
    shade = np.sqrt(np.clip(1 - (2.1 * over) ** 2, 0, 1)) * (1 - 1.5 * along**2)
    shade = 0.45 + 0.62 * shade
    warp, weft = (_jittered(rng, yarn) for yarn in _YARNS[rng.integers(len(_YARNS))])
    color = np.where(warp_on_top[..., None], warp, weft) * shade[..., None]
    color = color * (1 + 0.03 * noise(rng, 30) + 0.03 * noise(rng, 2))[..., None]
    full = np.ones((FINE, FINE), np.float32)
    lit = (color * light[..., None]).astype(np.float32)
    return Scene(lit, light, full, full * SIZE, toward)


_GLAZES = ((0.90, 0.89, 0.84), (0.40, 0.50, 0.76))
_PRINTS = ((0.16, 0.30, 0.55), (0.95, 0.94, 0.90))
_BOARDS = ((0.66, 0.50, 0.34), (0.52, 0.42, 0.36))


def _boards(rng: Generator) -> Floats:
    u, v = rotated((SIZE / 2, SIZE / 2), rng.uniform(-0.15, 0.15) + np.pi / 2 * rng.integers(2))
    v = v + 1.5 * noise(rng, 60)
    plank = (v + rng.uniform(0, 40)) / 40
    seam = step(0.035 - np.abs(plank - np.round(plank)), 0, 0.03)
    grain = 0.05 * profile(rng, v, 2.5) + 0.03 * profile(rng, v + 0.04 * u, 6)
    tone = 1 + grain + 0.05 * np.sin(2.4 * np.floor(plank + 0.5)) - 0.35 * seam
    return (_pick(rng, _BOARDS) * tone[..., None]).astype(np.float32)


def tile(rng: Generator) -> Scene:
    """A glazed, printed tile on wooden boards."""
    toward = _lamp(rng)
    light = _light(rng, toward)
    center = (SIZE / 2 + rng.uniform(-5, 5), SIZE / 2 + rng.uniform(-5, 5))
    turn, half = rng.uniform(-0.2, 0.2), rng.uniform(43, 49)
    x, y = rotated(center, turn)
    round_off = 5.0
    corner = np.maximum(np.stack([np.abs(x), np.abs(y)]) - (half - round_off), 0)
    inside = np.minimum(half - np.maximum(np.abs(x), np.abs(y)), round_off)
    across = np.where(corner.min(axis=0) > 0, round_off - np.hypot(*corner), inside)
    across = np.where(across >= round_off, half - np.maximum(np.abs(x), np.abs(y)), across)
    across = across.astype(np.float32)
    coverage = step(across)

    kind = rng.integers(len(_GLAZES))
    glaze, print_ = _jittered(rng, _GLAZES[kind]), _jittered(rng, _PRINTS[kind])
    # quarter circles about the corners, so that laid tiles make rings, and a disc in the middle
    reach = np.hypot(half - np.abs(x), half - np.abs(y)) / half
    ring = step(0.11 - np.abs(reach - rng.uniform(0.62, 0.74)), 0, 0.03)
    disc = step(rng.uniform(0.16, 0.26) - np.hypot(x, y) / half, 0, 0.03)
    color = blend(np.broadcast_to(glaze, (FINE, FINE, 3)), print_, np.maximum(ring, disc))
    color = color * (1 + 0.02 * noise(rng, 20))[..., None]
    # glaze runs thin at the edges, which face the light or turn away
    along_x, along_y = np.abs(x) > np.abs(y), np.abs(x) <= np.abs(y)
    facing = along_x * np.sign(x) * np.cos(toward - turn)
    facing = facing + along_y * np.sign(y) * np.sin(toward - turn)
    color = color + (0.16 * facing * step(3.0 - across, 0, 1.5))[..., None]
    gloss_x, gloss_y = rotated((center[0], center[1]), toward)
    gloss = np.exp(-(((gloss_x - rng.uniform(5, 25)) / 16) ** 2) - (gloss_y / 60) ** 2)
    color = color + (rng.uniform(0.05, 0.14) * gloss)[..., None]

    lit = blend(_shadowed(_boards(rng), coverage, toward, rng), color, coverage)
    return Scene((lit * light[..., None]).astype(np.float32), light, coverage, across, toward)


PARTS: dict[str, Callable[[Generator], Scene]] = {"washer": washer, "fabric": fabric, "tile": tile}
