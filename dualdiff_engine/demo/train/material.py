"""What the demo base is trained on: pictures from the factory, with prompts.

The denoiser sees good parts, cut-out pieces of them on black, and pieces of one part lying on
another; no defect. The autoencoder, which only has to reproduce pixels, sees everything that the
engine will ask it to code.
"""

from __future__ import annotations

import cv2
import numpy as np

from dualdiff_engine.demo.factory.defects import DEFECTS
from dualdiff_engine.demo.factory.fields import SIZE, Bytes
from dualdiff_engine.demo.factory.parts import PARTS
from dualdiff_engine.demo.factory.samples import make

# what the autoencoder that ships was shown; other defects joined the factory later
SHOWN = {"washer": ("scratch", "stain"), "fabric": ("hole", "stain"), "tile": ("crack", "chip")}
# apart from the seeds of every data set
FIRST_SEED = 10_000_000


def _cut(rng: np.random.Generator) -> Bytes:
    """Mask [SIZE, SIZE] of one to three strokes or patches: 255 inside."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(10, SIZE - 10, 2)
        if rng.random() < 0.5:
            turns = np.cumsum(rng.normal(0, 0.4, rng.integers(4, 14))) + rng.uniform(-np.pi, np.pi)
            walk = np.cumsum(5 * np.stack([np.cos(turns), np.sin(turns)], 1), 0)
            line = np.round(at + walk).astype(np.int32)
            cv2.polylines(mask, [line], False, 255, int(rng.integers(3, 7)))
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
            radii = rng.uniform(6, 26, (9, 1))
            corners = at + radii * np.stack([np.cos(angles), np.sin(angles)], 1)
            cv2.fillPoly(mask, [np.round(corners).astype(np.int32)], 255)
    return mask


def _piece(rng: np.random.Generator, picture: Bytes) -> Bytes:
    """Cut out of a picture, on black."""
    return np.where(_cut(rng)[..., None] > 0, picture, np.uint8(0))


def _laid_on(rng: np.random.Generator, picture: Bytes, other: Bytes) -> Bytes:
    """Pieces of another picture, more or less transparent."""
    share = rng.uniform(0.3, 1) * (_cut(rng)[..., None] > 0)
    return np.round(picture + share * (other.astype(np.float32) - picture)).astype(np.uint8)


def good_pictures(count: int, seed: int) -> list[tuple[Bytes, str]]:
    """(picture, prompt) for the denoiser: half of them plain parts."""
    made = []
    parts = list(PARTS)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        part = parts[number % len(parts)]
        picture = make(part, seed=FIRST_SEED + seed * 1_000_000 + number).image
        kind = rng.random()
        if kind < 1 / 4:
            made.append((_piece(rng, picture), f"a piece of {part}"))
        elif kind < 1 / 2:
            other = parts[(number + rng.integers(1, len(parts))) % len(parts)]
            lying = make(other, seed=FIRST_SEED + (seed + 1) * 1_000_000 - 1 - number).image
            made.append((_laid_on(rng, picture, lying), f"a {part} with a piece of {other}"))
        else:
            made.append((picture, f"a {part}"))
    return made


def any_pictures(count: int, seed: int) -> list[Bytes]:
    """Pictures for the autoencoder: good, defective, defects and pieces on black, surroundings."""
    made = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        part = list(PARTS)[number % len(PARTS)]
        defect = SHOWN[part][rng.integers(len(SHOWN[part]))]
        product = make(part, defect, seed=FIRST_SEED + seed * 1_000_000 + number)
        background = np.where(product.object_mask[..., None] > 0, np.uint8(0), product.good)
        choices = (
            product.good,
            product.image,
            product.anomaly,
            _piece(rng, product.good),
            background,
        )
        made.append(choices[rng.choice(5, p=(0.35, 0.25, 0.2, 0.12, 0.08))])
    return made


def marked_pictures(count: int, seed: int) -> tuple[list[Bytes], list[Bytes]]:
    """Pictures for the decoder, mirrored and turned, and masks of the defects in them.

    Every defect of the factory, whole and on black; good parts, pieces and surroundings, whose
    masks are empty.
    """
    pictures, masks = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number, 77])
        part = list(PARTS)[number % len(PARTS)]
        names = list(DEFECTS[part])
        defect = names[rng.integers(len(names))]
        product = make(part, defect, seed=5 * FIRST_SEED + seed * 1_000_000 + number)
        background = np.where(product.object_mask[..., None] > 0, np.uint8(0), product.good)
        kind = rng.choice(5, p=(0.2, 0.4, 0.25, 0.1, 0.05))
        choices = (
            product.good,
            product.image,
            product.anomaly,
            _piece(rng, product.good),
            background,
        )
        picture, mask = choices[kind], product.mask
        if kind not in (1, 2):
            mask = np.zeros_like(mask)
        turns, mirrored = int(rng.integers(4)), rng.integers(2)
        picture, mask = np.rot90(picture, turns), np.rot90(mask, turns)
        if mirrored:
            picture, mask = picture[:, ::-1], mask[:, ::-1]
        pictures.append(np.ascontiguousarray(picture))
        masks.append(np.ascontiguousarray(mask))
    return pictures, masks
