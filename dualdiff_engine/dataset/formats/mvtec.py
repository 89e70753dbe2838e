"""The tree of MVTec AD, which most detectors of anomalies read.

PRODUCT/train/good/NNNNNN.png
PRODUCT/test/good/NNNNNN.png                     normal pictures that are held out
PRODUCT/test/DEFECT/NNNNNN.png
PRODUCT/ground_truth/DEFECT/NNNNNN_mask.png      0 and 255
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualdiff_engine.dataset.formats.names import GOOD
from dualdiff_engine.dataset.formats.tree import Tree, place, save_mask


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    for product in tree.products:
        folder, good = root / product, tree.good_of(product)
        place_all(good.train, folder / "train" / GOOD)
        place_all(good.test, folder / "test" / GOOD)
        for defect, entries in tree.defects(product):
            for entry in entries:
                # a width that changes would mix up images and masks, which are paired by sorting
                name = f"{entry.number:06d}"
                place(entry.image, folder / "test" / defect / f"{name}.png")
                save_mask(entry.mask, folder / "ground_truth" / defect / f"{name}_mask.png")


def place_all(pictures: Sequence[Path], folder: Path) -> None:
    """Number pictures from 0 in a folder, which is there even if there are none."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        place(picture, folder / f"{number:06d}.png")
