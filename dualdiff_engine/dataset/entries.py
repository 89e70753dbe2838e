"""The pairs of a dataset, for what reads them: formats, galleries, users."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.rows import ACCEPTED, BY_HAND, parts_of, rows_of, union


@dataclass(frozen=True)
class Entry:
    """A pair in a dataset.

    image, mask, anomaly: files; the mask has 255 on the defect, 0 elsewhere. scores: by name, those
    that are known. verdict: accepted, or the gate that rejected it; by_hand: a person did.
    """

    product: str
    defect: str
    number: int
    image: Path
    mask: Path
    anomaly: Path | None
    scores: Mapping[str, float]
    verdict: str


def entries(store: Path) -> Iterator[Entry]:
    """Every pair of a dataset that has pictures, by product, defect, number and attempt.

    store: the folder that a job names under `out`. Of a number at most one pair is accepted; the
    others are in the quarantine. Raises OutputError.
    """
    store = Path(store)
    layout.require_dataset(store)
    accepted = union(store).accepted
    scores: dict[Task, Mapping[str, float]] = {}
    rejected: dict[Task, str] = {}
    for row in (row for part in parts_of(store) for row in rows_of(part)):
        task, verdict = Task.of_key(row["key"]), str(row["verdict"])
        if verdict == BY_HAND or (verdict != ACCEPTED and row.get("sha256")):
            rejected[task] = verdict
        if row.get("sha256"):
            scores[task] = _scores(row)
    for task in sorted(scores):
        if accepted[task.defect].get(task.number) == task.attempt:
            files, verdict = layout.pictures_of(store, task.defect, task.number), ACCEPTED
        elif task in rejected:
            files = layout.quarantined(store, task.defect, task.number, task.attempt)
            verdict = rejected[task]
        else:
            # a number that another attempt has taken
            continue
        product, _, defect = task.defect.partition("/")
        yield Entry(product, defect, task.number, **files, scores=scores[task], verdict=verdict)


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    found = row.get("scores")
    return dict(found) if isinstance(found, Mapping) else {}
