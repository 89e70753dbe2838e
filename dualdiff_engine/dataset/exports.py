"""A finished dataset in the formats that its job names, each in `out/formats/NAME`."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.entries import entries
from dualdiff_engine.dataset.formats import Exported, check_format, export
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.training.data import pictures_in

FOLDER = "formats"
_HELD_OUT = 0.2
# beside a format's folder: what is in it
_STAMP = "{}.json"
_NEXT, _LAST = ".{}.next", ".{}.last"


def check(job: Job) -> None:
    """Raises SettingsError for a format that there is not, or whose package is missing."""
    for form in job.formats:
        try:
            check_format(form)
        except SettingsError as error:
            raise SettingsError(f"formats: {error}") from None


def export_all(job: Job, accepted: Mapping[str, Mapping[int, int]]) -> Iterator[tuple[str, Any]]:
    """Write every format that is not there as it should be; an older export is replaced whole.

    accepted: defect -> number -> attempt, of all pairs of the dataset. Yields (name, `Exported`, or
    None where nothing has changed). Raises SettingsError, DataError, OutputError.
    """
    for form in job.formats:
        yield form, _write(job, form, accepted)


def _write(job: Job, form: str, accepted: Mapping[str, Mapping[int, int]]) -> Exported | None:
    top = job.root / FOLDER
    target, stamp = top / form, top / _STAMP.format(form)
    names = {product: folder for product, folder in job.good.items() if isinstance(folder, str)}
    good = {product: sorted(pictures_in(Path(folder))) for product, folder in names.items()}
    held = float(job.good.get("held_out", _HELD_OUT))
    content = _digest(accepted, good, held)
    if target.is_dir() and layout.read_json(stamp) == content:
        return None
    fresh, last = top / _NEXT.format(form), top / _LAST.format(form)
    with layout.naming(target):
        for path in (top, target):
            if path.is_symlink():
                raise SettingsError(f"{path} is a symbolic link: remove it")
        for path in (fresh, last):
            shutil.rmtree(path, ignore_errors=True)
    done = export(entries(job.root), form, fresh, good=good, held=held)
    with layout.naming(target):
        # without a stamp it is written again
        stamp.unlink(missing_ok=True)
        if target.exists():
            target.replace(last)
        fresh.replace(target)
        stamp.write_text(json.dumps(content) + "\n", "utf-8")
        shutil.rmtree(last, ignore_errors=True)
    return done


def _digest(
    accepted: Mapping[str, Mapping[int, int]], good: Mapping[str, list[Path]], held: float
) -> str:
    """Of all that decides what an export holds."""
    pairs = {defect: sorted(numbers.items()) for defect, numbers in sorted(accepted.items())}
    pictures = {
        product: [(path.name, path.stat().st_size) for path in paths]
        for product, paths in sorted(good.items())
    }
    text = json.dumps([pairs, pictures, held])
    return hashlib.sha256(text.encode()).hexdigest()
