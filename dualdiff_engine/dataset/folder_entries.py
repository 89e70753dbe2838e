"""What `dualdiff generate` wrote, as entries of a dataset."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.folder_writer import KINDS, MANIFEST, files_of

ACCEPTED = "accepted"
# of a line of a manifest; recipes with 1000 timesteps stay below 64 KiB
_MOST_LINE = 1 << 20


def folder_entries(
    root: str | Path, product: str | None = None, defect: str | None = None
) -> Iterator[Entry]:
    """Every pair in a folder by `dualdiff generate`, or in a tree of them.

    A tree is `root/PRODUCT/DEFECT/`, each with a manifest. Of a single folder the product has to be
    given; its defect is called like the folder unless it is given, too. A pair whose mask is empty,
    or that missed the bounds of `accept`, has the verdict empty or accept.

    Raises:
        SettingsError: a name is missing, or is given for a tree, which names its own.
        DataError: there is no such folder, a manifest is damaged, or a picture is missing or a
            symbolic link.
    """
    root = Path(root)
    if (root / MANIFEST).is_file():
        if not product:
            raise SettingsError(f"{root} does not say of which product it is: pass --product NAME")
        yield from _of_run(root, product, defect or root.resolve().name)
        return
    runs = sorted(path.parent for path in root.glob(f"*/*/{MANIFEST}"))
    if not runs:
        raise DataError(
            f"{root} holds no pairs: pass a folder that `dualdiff generate` wrote, or one with "
            "PRODUCT/DEFECT/ folders of that kind"
        )
    if product or defect:
        raise SettingsError(
            f"{root} names its products and defects by its folders: leave out --product and "
            "--defect, or pass one of the folders"
        )
    for run in runs:
        yield from _of_run(run, run.parent.name, run.name)


def _of_run(root: Path, product: str, defect: str) -> Iterator[Entry]:
    path, seen = root / MANIFEST, set[int]()
    if links := [kind for kind in KINDS if (root / kind).is_symlink()]:
        raise DataError(f"{root / links[0]} is a symbolic link: copy the pictures into {root}")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_MOST_LINE), b""), 1):
                row = _row(line)
                if row is None and not line.endswith(b"\n") and len(line) < _MOST_LINE:
                    # a run that was killed while it wrote the last line
                    return
                if row is None or row["index"] in seen:
                    raise DataError(f"{path}: line {number} is damaged: draw the run again")
                seen.add(row["index"])
                yield _entry(root, product, defect, row)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check it") from error


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        index, files = row["index"], row["files"]
        fits = type(index) is int and index >= 0 and files == files_of(index)
        return row if fits else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _entry(root: Path, product: str, defect: str, row: dict[str, Any]) -> Entry:
    files = {kind: root / file for kind, file in files_of(row["index"]).items()}
    for path in files.values():
        if path.is_symlink() or not path.is_file():
            raise DataError(f"{path} is missing or is no regular file: draw the run again")
    verdict = ACCEPTED
    if row.get("empty_mask") is True:
        verdict = "empty"
    elif row.get("accepted") is False:
        verdict = "accept"
    scores = row.get("scores")
    known = {
        str(name): float(value)
        for name, value in (scores.items() if isinstance(scores, dict) else ())
        if isinstance(value, int | float) and math.isfinite(value)
    }
    return Entry(product, defect, row["index"], **files, scores=known, verdict=verdict)
