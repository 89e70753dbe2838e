"""Hugging Face's imagefolder: pictures, masks and a table.

SPLIT/metadata.jsonl                             SPLIT: train, validation
SPLIT/images/NAME.png  SPLIT/masks/NAME.png      0 and 255; black for normal pictures
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dualdiff_engine.dataset.formats.tree import Item, Tree, place, save_grey, save_mask

_SPLITS = {"train": "train", "val": "validation"}


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    items = list(tree.items())
    scores = _scores(tree, items)
    for item in items:
        folder = root / _SPLITS[item.split]
        image, mask = f"images/{item.name}.png", f"masks/{item.name}.png"
        place(item.image, folder / image)
        if item.entry is not None:
            save_mask(item.entry.mask, folder / mask)
        else:
            save_grey(item.flags().astype(np.uint8), folder / mask)
        row = {"file_name": image, "mask_file_name": mask, **fields_of(item, scores)}
        with (folder / "metadata.jsonl").open("a", encoding="utf-8") as table:
            table.write(json.dumps(row) + "\n")


def _scores(tree: Tree, items: list[Item]) -> list[str]:
    """The scores that a row of every split has: datasets refuses splits of different types, and a
    column without a value has none.
    """
    known: dict[str, set[str]] = {item.split: set() for item in items}
    for item in items:
        known[item.split] |= set(item.entry.scores) if item.entry is not None else set()
    return [name for name in tree.scores if all(name in names for names in known.values())]


def fields_of(item: Item, scores: list[str]) -> dict[str, object]:
    """What a row says of a picture: flat, and every row the same fields."""
    known = item.entry.scores if item.entry is not None else {}
    return {
        "product": item.product,
        "defect": item.defect,
        "number": item.number,
        **{f"score_{name}": known.get(name) for name in scores},
    }
