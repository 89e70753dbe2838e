"""Whether a dataset's files are those that its rows were written for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.rows import ACCEPTED, State, is_row_of_files, parts_of, rows_of, union

THREADS = 4


@dataclass
class Verified:
    """What was found. sound: accepted pairs; faults: one line each."""

    sound: int = 0
    faults: list[str] = field(default_factory=list)


def verify(root: Path, *, remove: bool = False) -> Verified:
    """Compare every accepted pair with the hashes in its row, and the folders with the rows.

    remove: delete the pictures of pairs that are damaged, so that `make` draws them again. Raises
    OutputError.
    """
    layout.require_dataset(root)
    state, found = union(root, files=False), Verified()
    rows = _accepted(root, state)
    with ThreadPoolExecutor(THREADS) as pool:
        sound = pool.map(lambda own: any(is_row_of_files(root, row) for row in own), rows.values())
        for task, fine in zip(rows, sound, strict=True):
            found.sound += fine
            if not fine:
                found.faults.append(f"{task.key}: its pictures are gone or damaged")
                for path in layout.pictures_of(root, task.defect, task.number).values():
                    if remove:
                        with suppress(OSError):
                            path.unlink()
    found.faults += [f"{path}: no row lists it" for path in _strangers(root, state)]
    found.faults += _plan_faults(root, rows)
    return found


def _accepted(root: Path, state: State) -> dict[Task, list[Mapping[str, Any]]]:
    """The rows of every accepted pair: two writers may have written one each."""
    rows: dict[Task, list[Mapping[str, Any]]] = {}
    for row in (row for part in parts_of(root) for row in rows_of(part)):
        task = Task.of_key(row["key"])
        if row["verdict"] == ACCEPTED and state.accepted[task.defect].get(task.number) == (
            task.attempt
        ):
            rows.setdefault(task, []).append(row)
    return rows


def _strangers(root: Path, state: State) -> Iterator[Path]:
    """Files in the store that belong to no accepted pair."""
    for path in sorted((root / layout.STORE).rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        parts = path.relative_to(root / layout.STORE).parts
        own = len(parts) == 4 and parts[2] in layout.KINDS and path.suffix == ".png"
        name = path.stem
        listed = own and len(name) == 6 and name.isdecimal()
        if not listed or int(name) not in state.accepted.get("/".join(parts[:2]), {}):
            yield path


def _plan_faults(root: Path, rows: Mapping[Task, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Accepted pairs whose seeds are not those of the plan."""
    planned: dict[str, int] = {}
    plan = root / layout.PLAN
    with layout.naming(plan), plan.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                planned[row["key"]] = row["seed"]
            except (ValueError, KeyError, TypeError):
                return [f"{plan}: it is damaged: remove it and run make again"]
    return [
        f"{task.key}: its seed is not that of the plan"
        for task, own in rows.items()
        if planned.get(task.key, own[0].get("seed")) != own[0].get("seed")
    ]
