"""What a format writes from: checked pairs and normal pictures under their final names."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.formats.names import GOOD, joined
from dualdiff_engine.pictures import open_picture

Flags = NDArray[np.bool_]
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Good:
    """Normal pictures of a product: to learn from, and those held out for tests."""

    train: Sequence[Path] = ()
    test: Sequence[Path] = ()


@dataclass(frozen=True)
class Tree:
    """A dataset to write.

    pairs: by the slugs of product and defect, in the order of their numbers. good: by the slug of
    the product. held_out: share of the pairs for validation, in formats where pairs are trained on.
    """

    pairs: Mapping[tuple[str, str], Sequence[Entry]]
    good: Mapping[str, Good]
    held_out: float = 0.0
    products: Sequence[str] = field(init=False)

    def __post_init__(self) -> None:
        names = dict.fromkeys((*(product for product, _ in self.pairs), *self.good))
        object.__setattr__(self, "products", sorted(names))

    def defects(self, product: str) -> list[tuple[str, Sequence[Entry]]]:
        """Slug and pairs of every defect of a product."""
        return [(defect, rows) for (own, defect), rows in self.pairs.items() if own == product]

    def good_of(self, product: str) -> Good:
        """Normal pictures of a product; none where none were given."""
        return self.good.get(product, Good())

    @property
    def classes(self) -> list[str]:
        """What a detector tells apart, sorted: `PRODUCT/DEFECT`, of one product `DEFECT`."""
        return sorted({self._class_of(*names) for names in self.pairs})

    @property
    def scores(self) -> list[str]:
        """Names of the scores that any pair has, sorted."""
        return sorted({name for rows in self.pairs.values() for row in rows for name in row.scores})

    def _class_of(self, product: str, defect: str) -> str:
        return defect if len(self.products) == 1 else f"{product}/{defect}"

    def items(self) -> Iterator[Item]:
        """All pictures in one flat list, split in train and val, for formats without a tree."""
        number_of = {name: number for number, name in enumerate(self.classes)}
        for (product, defect), entries in self.pairs.items():
            label = number_of[self._class_of(product, defect)]
            held = held_out([entry.image for entry in entries], self.held_out)
            for entry in entries:
                split = "val" if entry.image in held else "train"
                name = joined(product, defect, f"{entry.number:06d}")
                yield Item(name, split, product, defect, entry.number, label, entry.image, entry)
        for product in self.products:
            good = self.good_of(product)
            for split, paths in (("train", good.train), ("val", good.test)):
                for number, path in enumerate(paths):
                    name = joined(product, GOOD, f"{split}-{number:06d}")
                    yield Item(name, split, product, GOOD, number, None, path, None)


@dataclass(frozen=True)
class Item:
    """One picture of a flat format.

    split: train or val. number: of the pair, or of the normal picture in its split. label: index in
    `Tree.classes`, None for a normal picture, which has no entry either.
    """

    name: str
    split: str
    product: str
    defect: str
    number: int
    label: int | None
    image: Path
    entry: Entry | None

    def flags(self) -> Flags:
        """bool [H, W], true on the defect."""
        if self.entry is not None:
            return flags_of(self.entry.mask)
        with Image.open(self.image) as image:
            return np.zeros((image.height, image.width), np.bool_)


def flags_of(mask: Path) -> Flags:
    """bool [H, W], true on the defect. Raises SettingsError."""
    return np.asarray(open_picture(mask, "mask", "L")) > 127


def held_out(paths: Sequence[Path], share: float) -> set[Path]:
    """Which files to hold out: of several at least one, never all.

    By the hash of their numbers in order, so that neighbours in time do not go together, and the
    same in every run.
    """
    count = round(share * len(paths))
    if share > 0 and len(paths) > 1:
        count = min(max(count, 1), len(paths) - 1)
    keys = [hashlib.sha256(b"%d" % number).digest() for number in range(len(paths))]
    return {paths[number] for number in sorted(range(len(paths)), key=keys.__getitem__)[:count]}


def place(source: Path, target: Path) -> None:
    """A picture as PNG under another name: a hard link where the disk allows, else a copy.

    Raises OSError, or SettingsError when it has to be decoded and cannot be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # links are followed: anomalib silently drops pictures that lead out of the tree
    source = source.resolve()
    if not _is_png(source):
        open_picture(source, "picture").save(target, "PNG")
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def png_of(source: Path) -> bytes:
    """A picture as PNG: its own bytes, or decoded if it has another format."""
    if _is_png(source):
        return source.read_bytes()
    content = io.BytesIO()
    open_picture(source, "picture").save(content, "PNG")
    return content.getvalue()


def _is_png(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(len(_PNG)) == _PNG


def save_grey(levels: NDArray[np.uint8], target: Path) -> None:
    """uint8 [H, W] as PNG of mode L."""
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(levels).save(target, "PNG")


def save_mask(mask: Path, target: Path) -> None:
    """A mask as PNG of mode L with 0 and 255 alone; such a file as it is."""
    with Image.open(mask) as image:
        levels = set(np.unique(np.asarray(image)).tolist()) if image.mode == "L" else {1}
        plain = image.format == "PNG" and levels <= {0, 255}
    if plain:
        place(mask, target)
    else:
        save_grey(np.where(flags_of(mask), np.uint8(255), np.uint8(0)), target)
