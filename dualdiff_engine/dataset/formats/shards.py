"""WebDataset shards: tar files that are read from end to end.

SPLIT-NNNNNN.tar                                 SPLIT: train, val; at most 1000 samples each
NAME.image.png  NAME.mask.png  NAME.json         a sample; mask 0 and 255

Samples are shuffled, the same way in every run, since a reader shuffles within a buffer only.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dualdiff_engine.dataset.formats.imagefolder import fields_of
from dualdiff_engine.dataset.formats.tree import Item, Tree, png_of

MOST = 1000


def write(tree: Tree, root: Path, most: int = MOST) -> None:
    """Write it, at most so many samples per shard. Raises OSError and SettingsError."""
    scores = tree.scores
    items = sorted(tree.items(), key=lambda item: hashlib.sha256(item.name.encode()).digest())
    for split in ("train", "val"):
        some = [item for item in items if item.split == split]
        for start in range(0, len(some), most):
            _write_shard(
                root / f"{split}-{start // most:06d}.tar", some[start : start + most], scores
            )


def _write_shard(path: Path, items: list[Item], scores: list[str]) -> None:
    from webdataset import TarWriter

    with path.open("wb") as file:
        # no encoder: bytes stay as they are. No times: equal input, equal shards
        writer = TarWriter(file, encoder=False, mtime=0)
        for item in items:
            mask = io.BytesIO()
            grey = np.where(item.flags(), np.uint8(255), np.uint8(0))
            Image.fromarray(grey).save(mask, "PNG")
            sample = {
                "__key__": item.name,
                "image.png": png_of(item.image),
                "mask.png": mask.getvalue(),
                "json": json.dumps(fields_of(item, scores)).encode(),
            }
            writer.write(sample)
        writer.close()
