"""A factory of synthetic parts: good ones, defective ones and the exact mask of every defect.

Everything follows from (part, defect, seed). A defective picture and its good twin share pose,
light, texture and camera noise: they are equal, byte for byte, wherever the mask is black.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from dualdiff_engine.demo.factory.defects import DEFECTS
from dualdiff_engine.demo.factory.fields import SIZE, Bytes, Floats, reduced
from dualdiff_engine.demo.factory.parts import PARTS, Scene
from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.settings import require_seed

# of a pixel that a defect has to cover to count; less is not drawn
LEAST_SHARE = 0.3
# deviation of the camera's noise, of full scale
CAMERA_NOISE = 0.006
# how much of a defect's contrast shows, from faint to plain
STRENGTH = (0.15, 0.75)


@dataclass(frozen=True)
class Product:
    """One picture from the factory; arrays are uint8, [SIZE, SIZE, 3] RGB or [SIZE, SIZE].

    image: what the camera sees. good: the same without the defect. mask: 255 on every pixel that
    the defect changes, 0 on all others, and all 0 for a good part. object_mask: 255 on the part,
    everywhere for a texture.
    """

    image: Bytes
    good: Bytes
    mask: Bytes
    object_mask: Bytes

    @property
    def anomaly(self) -> Bytes:
        """The defect alone, on black."""
        return np.where(self.mask[..., None] > 0, self.image, np.uint8(0))


def make(part: str, defect: str | None = None, *, seed: int) -> Product:
    """A part of the factory, with a defect or (None) without.

    part and defect: as in `DEFECTS`. Raises SettingsError for another part, defect or seed.
    """
    _require_known(part, defect)
    require_seed(seed)
    scene = PARTS[part](_generator("scene", part, seed))
    camera = _generator("camera", part, seed).normal(0, CAMERA_NOISE, (SIZE, SIZE, 3))
    plain = reduced(scene.color)
    good = _developed(plain, camera)
    object_mask = np.where(reduced(scene.coverage) >= 0.5, 255, 0).astype(np.uint8)
    if defect is None:
        return Product(good, good, np.zeros((SIZE, SIZE), np.uint8), object_mask)
    changed, share = _damaged(part, defect, scene, seed)
    strength = _generator("strength", part, seed).uniform(*STRENGTH)
    mixed = plain + strength * share[..., None] * (changed - plain)
    mask = np.where(share > 0, 255, 0).astype(np.uint8)
    image = np.where(mask[..., None] > 0, _developed(mixed, camera), good)
    return Product(image, good, mask, object_mask)


def _generator(purpose: str, part: str, seed: int) -> np.random.Generator:
    """Draws of one purpose do not shift those of another."""
    return np.random.default_rng([*f"{purpose}/{part}".encode(), seed])


def _require_known(part: str, defect: str | None) -> None:
    if part not in PARTS:
        raise SettingsError(f"no part {part!r}: choose one of {', '.join(PARTS)}")
    if defect is not None and defect not in DEFECTS[part]:
        raise SettingsError(
            f"no defect {defect!r} of {part}: choose one of {', '.join(DEFECTS[part])}"
        )


def _developed(color: Floats, camera: np.ndarray) -> Bytes:
    return np.round(np.clip(color + camera, 0, 1) * 255).astype(np.uint8)


def _damaged(part: str, defect: str, scene: Scene, seed: int) -> tuple[Floats, Floats]:
    """Color [SIZE, SIZE, 3] of the defect, and its share of every pixel [SIZE, SIZE]."""
    color, share = DEFECTS[part][defect](_generator(defect, part, seed), scene)
    small = reduced(share)
    return reduced(color), np.where(small >= LEAST_SHARE, small, 0).astype(np.float32)


def defective_seed(seed: int, number: int, n: int) -> int:
    """The seed of picture n of the defect of this number, from 1, in the data set of a seed."""
    return seed + 50_000 + number * 10_000 + n


def write_dataset(
    root: str | Path,
    part: str,
    defects: Sequence[str],
    *,
    good: int,
    defective: int,
    seed: int = 0,
) -> None:
    """Write one part in the layout that training reads: MVTec's, and object masks.

    `train/good/NNN.png`, `test/good/NNN.png` (a quarter as many), `test/<defect>/NNN.png`,
    `ground_truth/<defect>/NNN_mask.png`, and of the pictures in `train/good` and `test/<defect>`
    `object_mask/{good,<defect>}/NNN_mask.png`. good, defective: pictures in `train/good` and per
    defect. No two pictures share a seed, in one data set or in two whose seeds differ by 100,000.
    Raises SettingsError, OutputError when the folder holds a data set or cannot be written.
    """
    for defect in defects:
        _require_known(part, defect)
    root = Path(root)
    if (root / "train").exists() or (root / "test").exists():
        raise OutputError(f"{root} already holds a data set: choose another folder")
    for n in range(good):
        product = make(part, seed=seed + n)
        _save(root / f"train/good/{n:03d}.png", product.image)
        _save(root / f"object_mask/good/{n:03d}_mask.png", product.object_mask)
    for n in range(good // 4):
        _save(root / f"test/good/{n:03d}.png", make(part, seed=seed + 50_000 + n).image)
    for number, defect in enumerate(defects, 1):
        for n in range(defective):
            product = make(part, defect, seed=defective_seed(seed, number, n))
            _save(root / f"test/{defect}/{n:03d}.png", product.image)
            _save(root / f"ground_truth/{defect}/{n:03d}_mask.png", product.mask)
            _save(root / f"object_mask/{defect}/{n:03d}_mask.png", product.object_mask)


def _save(path: Path, pixels: Bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(pixels))
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): choose another folder"
        ) from error


def encode_png(pixels: Bytes) -> bytes:
    """uint8 [H, W] or [H, W, 3] RGB -> PNG file."""
    ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    return cv2.imencode(".png", ordered)[1].tobytes()
