"""The tree of MVTec LOCO AD, with a folder of masks per picture.

PRODUCT/train/good/NNNNNN.png  PRODUCT/validation/good/NNNNNN.png
PRODUCT/test/good/NNNNNN.png  PRODUCT/test/DEFECT/NNNNNN.png
PRODUCT/ground_truth/DEFECT/NNNNNN/000.png                       0 and 255

Normal pictures that are held out go to validation and test in turns. defects_config.json, which
gives saturation thresholds of logical defects, is left to those who know them.
"""

from __future__ import annotations

from pathlib import Path

from dualdiff_engine.dataset.formats.mvtec import place_all
from dualdiff_engine.dataset.formats.names import GOOD
from dualdiff_engine.dataset.formats.tree import Tree, place, save_mask


def write(tree: Tree, root: Path) -> None:
    """Write it. Raises OSError and SettingsError."""
    for product in tree.products:
        folder, good = root / product, tree.good_of(product)
        place_all(good.train, folder / "train" / GOOD)
        place_all(good.test[1::2], folder / "validation" / GOOD)
        place_all(good.test[::2], folder / "test" / GOOD)
        for defect, entries in tree.defects(product):
            for entry in entries:
                name = f"{entry.number:06d}"
                place(entry.image, folder / "test" / defect / f"{name}.png")
                save_mask(entry.mask, folder / "ground_truth" / defect / name / "000.png")
