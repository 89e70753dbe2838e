"""The tree of MVTec AD 2, with all defects of a product in one folder.

PRODUCT/train/good/NNNNNN.png  PRODUCT/validation/good/NNNNNN.png
PRODUCT/test_public/good/NNNNNN.png
PRODUCT/test_public/bad/NNNNNN_DEFECT.png
PRODUCT/test_public/ground_truth/bad/NNNNNN_DEFECT_mask.png      0 and 255

Normal pictures that are held out go to validation and test in turns. The tests without ground
truth, test_private and test_private_mixed, have no meaning here.
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
        test = folder / "test_public"
        place_all(good.train, folder / "train" / GOOD)
        place_all(good.test[1::2], folder / "validation" / GOOD)
        place_all(good.test[::2], test / GOOD)
        rows = [(defect, row) for defect, rows in tree.defects(product) for row in rows]
        for number, (defect, entry) in enumerate(rows):
            # the number in front: images and masks then sort alike whatever the defects are called
            name = f"{number:06d}_{defect}"
            place(entry.image, test / "bad" / f"{name}.png")
            save_mask(entry.mask, test / "ground_truth" / "bad" / f"{name}_mask.png")
