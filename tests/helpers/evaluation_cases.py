"""Folders and pictures that the evaluation tests share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from dualdiff_engine.evaluation.downstream import Material


def blobs(count: int, seed: int, size: int = 32) -> Material:
    """Bright squares on grey noise: a defect that any network finds."""
    rng = np.random.default_rng(seed)
    images = rng.integers(90, 130, (count, size, size, 3), dtype=np.uint8)
    masks = np.zeros((count, size, size), bool)
    for image, mask in zip(images, masks, strict=True):
        top, left = rng.integers(2, size - 10, 2)
        height, width = rng.integers(5, 9, 2)
        mask[top : top + height, left : left + width] = True
        image[mask] = rng.integers(200, 256, (int(mask.sum()), 3))
    return Material(images, masks)


def good(count: int, seed: int, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(90, 130, (count, size, size, 3), dtype=np.uint8)


def write_run(
    root: Path, material: Material, *, manifest: bool = True, adapter: str = "part-dent"
) -> Path:
    """As `dualdiff generate` does; anomaly pictures agree with images, masks with both."""
    for kind in ("image", "anomaly", "mask"):
        (root / kind).mkdir(parents=True, exist_ok=True)
    rows = []
    for n, (image, mask) in enumerate(zip(material.images, material.masks, strict=True)):
        name = f"{n:05d}.png"
        anomaly = np.where(mask[..., None], image, np.uint8(0))
        flags = np.where(mask, np.uint8(255), np.uint8(0))
        for kind, pixels in (("image", image), ("anomaly", anomaly), ("mask", flags)):
            Image.fromarray(pixels).save(root / kind / name)
        source = {"source": f"/x/{adapter}/pytorch_lora_weights.safetensors", "sha256": "ab" * 32}
        files = {kind: f"{kind}/{name}" for kind in ("image", "anomaly", "mask")}
        rows.append({"index": n, "files": files, "seed": n, "recipe": {"adapter": source}})
    if manifest:
        (root / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def write_real(root: Path, material: Material, plain: np.ndarray, defect: str = "dent") -> Path:
    """MVTec layout; the good pictures are halved between train and test."""
    folders = (f"test/{defect}", f"ground_truth/{defect}", "train/good", "test/good")
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for n, (image, mask) in enumerate(zip(material.images, material.masks, strict=True)):
        Image.fromarray(image).save(root / f"test/{defect}/{n:03d}.png")
        flags = np.where(mask, np.uint8(255), np.uint8(0))
        Image.fromarray(flags).save(root / f"ground_truth/{defect}/{n:03d}_mask.png")
    for n, image in enumerate(plain):
        Image.fromarray(image).save(root / ("train" if n % 2 else "test") / f"good/{n:03d}.png")
    return root
