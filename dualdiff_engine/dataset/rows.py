"""What the parts of the manifest say: the union of all rows, by key."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.errors import OutputError

ACCEPTED, BY_HAND, FAILED = "accepted", "by_hand", "error"
# a pair whose worker died or stopped: it is not drawn with another seed
CRASH, HANG = "crash", "hang"
KILLERS = (CRASH, HANG)
# of one pair, after which it is set aside
MOST_DEATHS = 2
# bytes
_BLOCK = 1 << 16


def parts_of(root: Path) -> list[Path]:
    """The parts of the manifest, by name."""
    return sorted((root / layout.PARTS).glob("*.jsonl"))


def rows_of(part: Path, start: int = 0, end: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a part from one byte to another; the torn last line of a crash is left out.

    Raises OutputError for a damaged line.
    """
    try:
        with part.open("rb") as lines:
            lines.seek(start)
            for line in lines:
                start += len(line)
                if not line.endswith(b"\n") or (end is not None and start > end):
                    return
                try:
                    row = json.loads(line)
                    row["key"], row["verdict"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise OutputError(
                        f"{part}: the line that ends at byte {start} is damaged: remove it; its "
                        "pair is drawn again"
                    ) from None
                yield row
    except OSError as error:
        raise OutputError(f"{part} cannot be read ({error.strerror}): check it") from error


@dataclass
class State:
    """What a dataset holds.

    accepted: defect -> number -> its row's attempt. tried: defect -> number -> attempts used up.
    killers: defect -> number -> crash or hang. rejected: defect -> verdict -> how many. deaths: key
    -> workers that died over it. sizes: part -> bytes of whole rows that were read; rows: part ->
    defect -> verdict -> rows in them.
    """

    accepted: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    tried: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))
    killers: dict[str, dict[int, str]] = field(default_factory=lambda: defaultdict(dict))
    rejected: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    deaths: Counter[str] = field(default_factory=Counter)
    sizes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set)

    def add(self, root: Path, row: Mapping[str, Any]) -> Task:
        """Take a row in; the same one twice is one. Returns its pair."""
        task, verdict = Task.of_key(row["key"]), row.get("verdict")
        if verdict == "death":
            self.deaths[task.key] += 1
        elif verdict == ACCEPTED:
            self._accept(root, task, row)
        elif verdict != FAILED:
            if (task.key, str(verdict)) in self._seen:
                return task
            self._seen.add((task.key, str(verdict)))
            self.rejected[task.defect][str(verdict)] += 1
            if verdict in KILLERS:
                self.killers[task.defect][task.number] = str(verdict)
            self._use_up(task)
            if verdict == BY_HAND and self.accepted[task.defect].get(task.number) == task.attempt:
                del self.accepted[task.defect][task.number]
        return task

    def _accept(self, root: Path, task: Task, row: Mapping[str, Any]) -> None:
        own = self.accepted[task.defect]
        if (task.key, BY_HAND) in self._seen:
            return
        known = own.get(task.number)
        if known is not None and known != task.attempt and not is_row_of_files(root, row):
            return
        own[task.number] = task.attempt

    def _use_up(self, task: Task) -> None:
        own = self.tried[task.defect]
        own[task.number] = max(own.get(task.number, 0), task.attempt + 1)

    def next_of(self, defect: str, number: int, attempts: int) -> Task | None:
        """The attempt that a number needs; None if it is accepted, set aside, or out of them."""
        if number in self.accepted[defect] or number in self.killers[defect]:
            return None
        attempt = self.tried[defect].get(number, 0)
        return Task(defect, number, attempt) if attempt < attempts else None

    def tally(self) -> dict[str, Any]:
        """What `status` reads in place of all rows, JSON-ready.

        parts: name -> [bytes, defect -> verdict -> rows]; correction: what is to be added to them,
        since a pair may have several rows.
        """
        parts = {name: [self.sizes[name], own] for name, own in self.rows.items()}
        correction: dict[str, Counter[str]] = defaultdict(Counter)
        for name in self.accepted.keys() | self.rejected.keys():
            correction[name].update({ACCEPTED: len(self.accepted[name]), **self.rejected[name]})
        for own in self.rows.values():
            for name, counts in own.items():
                correction[name].subtract(counts)
        return {"parts": parts, "correction": correction}


def is_row_of_files(root: Path, row: Mapping[str, Any]) -> bool:
    """Whether the files of an accepted row are those that it was written for."""
    # it loads PyTorch, which readers do not need
    from dualdiff_engine.files import sha256_of

    task = Task.of_key(row["key"])
    recorded = row.get("sha256")
    if not isinstance(recorded, Mapping):
        return False
    try:
        files = layout.pictures_of(root, task.defect, task.number)
        return all(sha256_of(file) == recorded.get(kind) for kind, file in files.items())
    except OSError:
        return False


def union(root: Path, *, files: bool = True) -> State:
    """The state of a dataset. Raises OutputError.

    files: whether accepted pairs must have their pictures; those without are to be drawn again.
    """
    state = State()
    refresh(root, state, files=files)
    return state


def refresh(root: Path, state: State, *, files: bool = True) -> None:
    """Take in what was written since `state` was read; what it has read is not read again.

    files: as of `union`. Raises OutputError.
    """
    for part in parts_of(root):
        start = state.sizes.get(part.name, 0)
        end = _end_of_rows(part, start)
        own = state.rows.setdefault(part.name, defaultdict(Counter))
        for row in rows_of(part, start, end) if end > start else ():
            own[state.add(root, row).defect][row["verdict"]] += 1
        state.sizes[part.name] = end
    if files:
        for name, accepted in state.accepted.items():
            there = _numbers(root, name)
            for number in [n for n in accepted if n not in there]:
                del accepted[number]


def _end_of_rows(part: Path, start: int) -> int:
    """The byte after the last whole row, or start: a row being written is read the next time."""
    try:
        with part.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > start:
                begin = max(start, end - _BLOCK)
                file.seek(begin)
                if (last := file.read(end - begin).rfind(b"\n")) >= 0:
                    return begin + last + 1
                end = begin
    except OSError as error:
        raise OutputError(f"{part} cannot be read ({error.strerror}): check it") from error
    return start


def _numbers(root: Path, defect: str) -> set[int]:
    """Numbers that have all of their pictures."""
    found: list[set[str]] = []
    for kind in layout.KINDS:
        try:
            with os.scandir(root / layout.STORE / defect / kind) as entries:
                found.append({entry.name for entry in entries})
        except FileNotFoundError:
            return set()
    names = set.intersection(*found)
    return {int(n[:6]) for n in names if len(n) == 10 and n[:6].isdecimal()}
