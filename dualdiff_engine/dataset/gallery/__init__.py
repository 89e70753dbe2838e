"""A page to look through a dataset: `index.html`, `page.js` and the pairs in `rows.js`.

It needs no server: browsers open it from the disk. Pictures stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.errors import DataError, OutputError, SettingsError
from dualdiff_engine.files import write_whole

PAGE = ("index.html", "page.js")
ROWS = "rows.js"


def write_gallery(entries: Iterable[Entry], out: str | Path) -> int:
    """Write the page, over an older one; returns how many pairs it shows.

    Args:
        entries: the pairs, accepted or not.
        out: the folder: new, empty, or a gallery.

    Raises:
        DataError: there are no pairs.
        SettingsError: a name cannot be a line of `rejected.txt`.
        OutputError: the folder holds other things or cannot be written.
    """
    out = Path(out)
    _refuse_strangers(out)
    rows = list(entries)
    if not rows:
        raise DataError("there are no pairs to show")
    content = _content(rows, out.resolve())
    # ASCII only, so that no letter ends the line or the script early
    text = json.dumps(content, ensure_ascii=True, allow_nan=False)
    identity = hashlib.sha256(text.encode()).hexdigest()[:16]
    # first: a page without rows shows nothing, rows without a page are not seen
    line = f"window.GALLERY = {text};\nwindow.GALLERY.id = {json.dumps(identity)};\n"
    write_whole(out / ROWS, line.encode("ascii"))
    for name in reversed(PAGE):
        write_whole(out / name, (resources.files(__package__) / name).read_bytes())
    return len(rows)


def _refuse_strangers(out: Path) -> None:
    own = {*PAGE, ROWS}
    try:
        others = sorted(p.name for p in out.iterdir() if p.name not in own or p.is_symlink())
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{out} cannot be read ({error.strerror}): choose another") from error
    # what a killed run left is removed by the next one
    if others := [name for name in others if not name.endswith(".partial")]:
        raise OutputError(f"{out} holds {others[0]} and is no gallery: choose another folder")


def _content(rows: list[Entry], out: Path) -> dict[str, object]:
    """What the page knows of the pairs; names by their places in lists."""
    lists = {
        "products": sorted({row.product for row in rows}),
        "defects": sorted({row.defect for row in rows}),
        "verdicts": sorted({row.verdict for row in rows}),
        "scores": sorted({name for row in rows for name in row.scores}),
    }
    for name in (*lists["products"], *lists["defects"]):
        if not name.isprintable() or "/" in name:
            raise SettingsError(f"{name!r} cannot be a name in rejected.txt: rename its folder")
    place = {kind: {name: n for n, name in enumerate(names)} for kind, names in lists.items()}
    found = [
        {
            "product": place["products"][row.product],
            "defect": place["defects"][row.defect],
            "verdict": place["verdicts"][row.verdict],
            "number": row.number,
            "image": _address(row.image, out),
            "mask": _address(row.mask, out),
            "anomaly": None if row.anomaly is None else _address(row.anomaly, out),
            "scores": [_finite(row.scores.get(name)) for name in lists["scores"]],
        }
        for row in rows
    ]
    return {**lists, "rows": found}


def _address(path: Path, out: Path) -> str:
    """Of a picture, relative to the page: the two may be moved together."""
    return f"{_folder_address(path.parent, out)}/{quote(path.name)}"


@lru_cache(maxsize=256)
def _folder_address(folder: Path, out: Path) -> str:
    return quote(os.path.relpath(folder.resolve(), out).replace(os.sep, "/"))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
