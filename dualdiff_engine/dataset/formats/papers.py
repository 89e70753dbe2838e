"""What the papers' own evaluation scripts read: PRODUCT/DEFECT/{image,mask}/NUMBER, nothing else.

The scripts count the files and then ask for every number from 0 on, so that numbers have no gaps.
Normal pictures come from MVTec's own tree there and are not written.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dualdiff_engine.dataset.formats.tree import Tree, flags_of, place, save_mask


@dataclass(frozen=True)
class Style:
    """name: of a file, by its number. least, most: pairs that the script reads of a defect."""

    name: str
    least: int = 1
    most: int | None = None


STYLES = {
    # classification script
    "dualanodiff": Style("{}.png"),
    # unet_utils/data_loader.py
    "anomalydiffusion": Style("{}.jpg", most=500),
    # it reads 1000, whatever is there
    "seas": Style("{:03d}.png", least=1000, most=1000),
}


def write(tree: Tree, root: Path, style: str = "dualanodiff") -> None:
    """Write it. Raises OSError and SettingsError."""
    chosen = STYLES[style]
    for (product, defect), entries in tree.pairs.items():
        folder = root / product / defect
        if len(entries) < chosen.least:
            warnings.warn(
                f"{product}/{defect} has {len(entries)} pairs: {style} reads {chosen.least}",
                stacklevel=2,
            )
        if chosen.most is not None and len(entries) > chosen.most:
            warnings.warn(
                f"{product}/{defect} has {len(entries)} pairs: {style} reads the first "
                f"{chosen.most}",
                stacklevel=2,
            )
        for number, entry in enumerate(entries):
            name = chosen.name.format(number)
            _place(entry.image, entry.mask, folder / "image" / name, folder / "mask" / name)


def _place(image: Path, mask: Path, to_image: Path, to_mask: Path) -> None:
    if to_image.suffix == ".png":
        place(image, to_image)
        save_mask(mask, to_mask)
        return
    for folder in (to_image.parent, to_mask.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with Image.open(image) as picture:
        picture.convert("RGB").save(to_image, "JPEG", quality=95, subsampling=0)
    grey = Image.fromarray(np.where(flags_of(mask), np.uint8(255), np.uint8(0)))
    # so fine that half of full scale separates the two again
    grey.save(to_mask, "JPEG", quality=100)
