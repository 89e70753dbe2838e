"""COCO: an object per connected part of a defect, its mask as RLE, exact to the pixel.

annotations/instances_SPLIT.json
SPLIT/NAME.png                                   SPLIT: train, val

Source: https://cocodataset.org/#format-data. Polygons would lose holes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualdiff_engine.dataset.formats.parts import Part, parts_of
from dualdiff_engine.dataset.formats.tree import Item, Tree, place


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    items = defaultdict(list)
    for item in tree.items():
        place(item.image, root / item.split / f"{item.name}.png")
        items[item.split].append(item)
    # numbers from 1, as in COCO: 0 is background to many readers
    categories = [
        {"id": number, "name": name, "supercategory": "defect"}
        for number, name in enumerate(tree.classes, 1)
    ]
    (root / "annotations").mkdir()
    for split, some in items.items():
        content = {"categories": categories, **_content(some, root / split)}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), "ascii")


def _content(items: list[Item], folder: Path) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, item in enumerate(items, 1):
        name = f"{item.name}.png"
        with Image.open(folder / name) as image:
            images.append(
                {"id": number, "file_name": name, "width": image.width, "height": image.height}
            )
        if item.label is None:
            continue
        for part in parts_of(item.flags()):
            known = {"id": len(annotations) + 1, "image_id": number, "category_id": item.label + 1}
            annotations.append({**known, **_object(part)})
    return {"images": images, "annotations": annotations}


def _object(part: Part) -> dict[str, Any]:
    from pycocotools import mask

    run_lengths = mask.encode(np.asfortranarray(part.flags, np.uint8))
    return {
        "segmentation": {
            "size": list(part.flags.shape),
            "counts": run_lengths["counts"].decode("ascii"),
        },
        "bbox": list(part.box),
        "area": part.area,
        # 1 would be a crowd, which training leaves out
        "iscrowd": 0,
    }
