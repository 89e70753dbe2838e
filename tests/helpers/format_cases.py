"""Small datasets for the tests of formats: pairs with rings and many parts, normal pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from dualdiff_engine.folder_writer import MANIFEST, files_of


def mask_of(kind: str, size: int = 96, seed: int = 0) -> Image.Image:
    """0 and 255: a ring, rings in rings, many parts, specks, or a blob."""
    mask = Image.new("L", (size, size + 8), 0)
    pen, rng = ImageDraw.Draw(mask), np.random.default_rng(seed)
    if kind == "ring":
        pen.ellipse((20, 20, 80, 80), fill=255)
        pen.ellipse((35, 35, 65, 65), fill=0)
    elif kind == "rings":
        for radius, level in ((44, 255), (36, 0), (28, 255), (20, 0), (10, 255)):
            pen.ellipse((48 - radius, 50 - radius, 48 + radius, 50 + radius), fill=level)
    elif kind == "parts":
        for cell in rng.permutation(16)[:12].tolist():
            left, top = cell % 4 * 24, cell // 4 * 24
            pen.rectangle((left + 2, top + 2, left + 12, top + 14), fill=255)
    elif kind == "specks":
        # a pixel, rows of them in two directions, and the corner
        pen.point((10, 10), fill=255)
        pen.line((30, 10, 50, 10), fill=255)
        pen.line((30, 30, 45, 45), fill=255)
        pen.point((size - 1, size + 7), fill=255)
    else:
        left, top = rng.integers(4, 40, 2)
        pen.ellipse((left, top, left + 40, top + 30), fill=255)
    return mask


def write_run(root: Path, kinds: list[str], first: int = 0) -> Path:
    """A folder as `dualdiff generate` leaves it."""
    for kind in ("image", "anomaly", "mask"):
        (root / kind).mkdir(parents=True)
    rng = np.random.default_rng(first)
    with (root / MANIFEST).open("w") as manifest:
        for index, kind in enumerate(kinds):
            mask, files = mask_of(kind, seed=index), files_of(index)
            for name in ("image", "anomaly"):
                pixels = rng.integers(0, 255, (mask.height, mask.width, 3), np.uint8)
                Image.fromarray(pixels).save(root / files[name])
            mask.save(root / files["mask"])
            row = {
                **{"index": index, "files": files, "seed": index, "empty_mask": False},
                **{"scores": {"contrast": 0.5 + index, "gap": None}, "accepted": None},
                "recipe": {"seed": index},
            }
            manifest.write(json.dumps(row) + "\n")
    return root


def write_good(root: Path, count: int = 5) -> list[Path]:
    """Normal pictures; the last one is a JPEG."""
    root.mkdir(parents=True, exist_ok=True)
    rng, paths = np.random.default_rng(7), []
    for number in range(count):
        name = f"{number:03d}.{'jpg' if number == count - 1 else 'png'}"
        Image.fromarray(rng.integers(0, 255, (104, 96, 3), np.uint8)).save(root / name)
        paths.append(root / name)
    return paths


def flags(path: Path) -> np.ndarray:
    """bool [H, W] of a mask file."""
    return np.asarray(Image.open(path).convert("L")) > 127


def names_in(root: Path) -> set[str]:
    """Every file below a folder."""
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def same_pixels(one: Path, other: Path) -> bool:
    """Whether two pictures hold the same."""
    return np.array_equal(*(np.asarray(Image.open(path).convert("RGB")) for path in (one, other)))


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & other).sum() / (one | other).sum())
