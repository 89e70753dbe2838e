"""Records of an evaluation: what was measured, on what, with which versions."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import DataError, OutputError
from dualdiff_engine.evaluation import quality
from dualdiff_engine.evaluation.data import Sample
from dualdiff_engine.files import write_whole
from dualdiff_engine.pair import versions

Measure = Callable[[Sequence[Sample], Sequence[Sample]], dict[str, Any]]


def quality_record(
    pairs: Sequence[Sample],
    train: Sequence[Sample] = (),
    extra: Mapping[str, Measure] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the quality of pairs, defect by defect.

    Args:
        pairs: as found by `data.find_pairs`.
        train: the real pictures that the adapters were trained on.
        extra: further measures by name, called with the pairs and training pictures of a defect.
        report: called with one line of progress per defect.

    Returns:
        `versions`, and under `defects` the result of `quality.measure` per defect; JSON-ready.

    Raises:
        DataError: it is unclear which training pictures belong to which pairs.
    """
    groups = dict(quality.by_defect(pairs))
    matched = {name: _match(name, groups, train) for name in groups}
    found: dict[str, Any] = {}
    for name, samples in groups.items():
        report(f"{name}: {len(samples)} pairs")
        found[name] = quality.measure(samples, matched[name])
        for label, measure in (extra or {}).items():
            found[name][label] = measure(samples, matched[name])
    return {"versions": versions(), "defects": found}


def _match(
    name: str, groups: Mapping[str, list[Sample]], train: Sequence[Sample]
) -> Sequence[Sample]:
    """Training pictures of the same defect; those of the only one, whatever it is called."""
    real = dict(quality.by_defect(train))
    if name in real or not real:
        return real.get(name, ())
    if len(real) == len(groups) == 1:
        return train
    raise DataError(
        f"the pairs are of {', '.join(groups)}, the training pictures of {', '.join(real)}: "
        "evaluate one adapter at a time and choose its training pictures with --defect"
    )


def check_writable(path: Path) -> None:
    """Raises OutputError for a file that could not be written later."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{path} cannot be written: choose a file in a folder that exists")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all. Raises OutputError."""
    content = json.dumps(record, indent=2, allow_nan=False) + "\n"
    write_whole(path, content.encode())
