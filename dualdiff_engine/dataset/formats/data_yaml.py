"""`data.yaml`, by which Ultralytics finds a dataset."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dualdiff_engine.dataset.formats.tree import Tree
from dualdiff_engine.errors import SettingsError


def write_data_yaml(tree: Tree, root: Path, names: Sequence[str], **more: str) -> None:
    """Write it into `root`. Without `path`, folders are looked for beside it.

    Raises SettingsError when no pair is held out: Ultralytics refuses a dataset without validation.
    """
    if not any(item.split == "val" and item.entry is not None for item in tree.items()):
        raise SettingsError(
            "no pair is held out to validate with, which Ultralytics requires: "
            "pass held_out above 0, and at least two pairs"
        )
    lines = ["train: images/train", "val: images/val"]
    lines += [f"{key}: {value}" for key, value in more.items()]
    # a JSON string is one of YAML, too
    lines += ["names:", *(f"  {number}: {json.dumps(name)}" for number, name in enumerate(names))]
    (root / "data.yaml").write_text("\n".join(lines) + "\n", "ascii")
