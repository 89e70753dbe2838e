"""How far a dataset is, read from another process while it is made, without reading every row."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.rows import ACCEPTED, FAILED, KILLERS, parts_of, rows_of

# seconds without a sign of life, after which a worker is not counted on
SILENT = 120.0
_UNCOUNTED = (ACCEPTED, FAILED, "death")


@dataclass(frozen=True)
class DefectStatus:
    """Of one defect.

    set_aside: verdict -> rejected pairs. rate: accepted pairs per hour of the workers that are
    alive; None while unknown.
    """

    name: str
    wanted: int
    accepted: int
    set_aside: dict[str, int]
    rate: float | None


@dataclass(frozen=True)
class WorkerStatus:
    """Of one worker of the latest runs.

    silent: seconds since its last sign of life. state: alive, silent or ended. waited: seconds that
    its device waited for pairs to be written.
    """

    name: str
    host: str
    pid: int
    device: str
    silent: float
    state: str
    waited: float


@dataclass(frozen=True)
class Status:
    """Of a dataset. left: seconds until it is complete, None while unknown; 0 when it is."""

    defects: list[DefectStatus]
    workers: list[WorkerStatus]
    left: float | None

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def read(root: Path, now: float | None = None) -> Status:
    """The status of a dataset. Raises OutputError where there is none, or it is damaged.

    Counts come from the tally of the last run and from what its workers say of themselves; only
    rows that came after both are read. now: seconds since 1970.
    """
    layout.require_dataset(root)
    now = time.time() if now is None else now
    signs = {path.stem: layout.read_json(path) for path in (root / layout.WORKERS).glob("*.json")}
    signs = {name: said for name, said in signs.items() if isinstance(said, dict)}
    counted = _counted(root, {said["part"]: said for said in signs.values()})
    alive = {n: s for n, s in signs.items() if not s["ended"] and now - s["time"] < SILENT}
    rates = _rates(alive, now)
    job = layout.read_json(root / layout.JOB) or {}
    defects = []
    for spec in job.get("defects", ()):
        name = f"{spec['product']}/{spec['defect']}"
        own = counted[name]
        aside = {k: v for k, v in sorted(own.items()) if v and k not in _UNCOUNTED}
        accepted = min(own[ACCEPTED], spec["pairs"])
        defects.append(DefectStatus(name, spec["pairs"], accepted, aside, rates.get(name)))
    return Status(defects, _workers(signs, now), _left(defects, sum(rates.values())))


def pace(root: Path) -> float | None:
    """Seconds per accepted pair of the workers of the latest run together, None if not known."""
    signs = {path.stem: layout.read_json(path) for path in (root / layout.WORKERS).glob("*.json")}
    rate = sum(_rates(signs, 0.0).values())
    return 3600 / rate if rate else None


def _counted(root: Path, signs: Mapping[str, Mapping[str, Any]]) -> dict[str, Counter[str]]:
    """Pairs by defect and verdict. signs: by part."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    tally = layout.read_json(root / layout.TALLY) or {"parts": {}, "correction": {}}
    _add(counted, tally["correction"])
    for part in parts_of(root):
        size, counts = tally["parts"].get(part.name, (0, {}))
        said = signs.get(part.name)
        if said is not None and said["offset"] > size:
            size, counts = said["offset"], said["counts"]
        _add(counted, counts)
        if part.stat().st_size > size:
            for row in rows_of(part, size):
                counted[Task.of_key(row["key"]).defect][row["verdict"]] += 1
    return counted


def _add(counted: dict[str, Counter[str]], counts: Mapping[str, Mapping[str, int]]) -> None:
    for name, own in counts.items():
        counted[name].update(own)


def _rates(alive: Mapping[str, Mapping[str, Any]], now: float) -> dict[str, float]:
    """Accepted pairs of each defect per hour; now: 0 for a time that is over."""
    rates: dict[str, float] = defaultdict(float)
    for said in alive.values():
        recent = said["recent"]
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            continue
        # the first row ends the time before, which is not known
        hours = (max(recent[-1][0], min(now, said["time"])) - recent[0][0]) / 3600
        for _, what in recent[1:]:
            defect, _, verdict = what.rpartition(" ")
            rates[defect] += (verdict == ACCEPTED) / hours
    return dict(rates)


def _left(defects: list[DefectStatus], rate: float) -> float | None:
    # a pair that ended its worker is not drawn again
    killed = [sum(d.set_aside.get(verdict, 0) for verdict in KILLERS) for d in defects]
    missing = sum(max(0, d.wanted - d.accepted - k) for d, k in zip(defects, killed, strict=True))
    if not missing:
        return 0.0
    return missing / rate * 3600 if rate else None


def _workers(signs: Mapping[str, Mapping[str, Any]], now: float) -> list[WorkerStatus]:
    found = []
    for name, said in sorted(signs.items()):
        silent = max(0.0, now - said["time"])
        state = "ended" if said["ended"] else "alive" if silent < SILENT else "silent"
        one = (name, said["host"], said["pid"], said["device"], silent, state, said["waited"])
        found.append(WorkerStatus(*one))
    return found
