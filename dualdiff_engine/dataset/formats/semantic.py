"""Semantic segmentation as Ultralytics reads it: a mask holds the number of the class per pixel.

data.yaml
images/SPLIT/NAME.png  masks/SPLIT/NAME.png      SPLIT: train, val; 0 is background, 1 … are defects

Source: https://docs.ultralytics.com/datasets/semantic. Masks of 0 and 255 would train on nothing:
255 is the label that is ignored there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dualdiff_engine.dataset.formats.data_yaml import write_data_yaml
from dualdiff_engine.dataset.formats.tree import Tree, place, save_grey
from dualdiff_engine.errors import SettingsError

_IGNORED = 255


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    if len(tree.classes) >= _IGNORED:
        raise SettingsError(
            f"{len(tree.classes)} defects are too many for masks of 8 bits: export fewer products"
        )
    write_data_yaml(tree, root, ["background", *tree.classes], masks_dir="masks")
    for item in tree.items():
        name = f"{item.split}/{item.name}.png"
        place(item.image, root / "images" / name)
        number = 0 if item.label is None else item.label + 1
        save_grey(np.where(item.flags(), np.uint8(number), np.uint8(0)), root / "masks" / name)
