"""A writer of a dataset: a pair's files, then its row, each on the disk before the next."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.rows import ACCEPTED
from dualdiff_engine.errors import OutputError
from dualdiff_engine.files import sync

# of a recipe, what every pair has of its own
_PER_PAIR = ("seed", "attempt", "mask", "window")


class FencedError(OutputError):
    """A newer run has taken over; this one must not write any more."""


class Writer:
    """Writes pairs of a run, with a part of the manifest of its own. Thread-safe.

    Args:
        root: The dataset's folder, which `layout.make_folders` made.
        run: Id of the run; writes are refused when the shard's fence names another.
        name: Of this writer, as no other is called: it starts with the run's id.
        shard: Name of the shard.
    """

    def __init__(self, root: Path, run: str, name: str, shard: str) -> None:
        self.root, self.run, self.name, self.shard = root, run, name, shard
        self._lock = threading.Lock()
        self._recipes: set[str] = set()
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.part = root / layout.PARTS / f"{name}.jsonl"
        with layout.naming(self.part):
            (root / layout.PARTIAL / name).mkdir(exist_ok=True)
            self._rows = self.part.open("xb", buffering=0)
            self._started = (root / layout.STARTED / f"{name}.jsonl").open("xb", buffering=0)
            sync(self.part.parent)

    def counted(self) -> tuple[int, dict[str, dict[str, int]]]:
        """Bytes of its part, and defect -> verdict -> rows in them."""
        with self._lock:
            end = 0 if self._rows.closed else self._rows.tell()
            return end, {name: dict(counts) for name, counts in self._counts.items()}

    def check_fence(self) -> None:
        """Raises FencedError."""
        if layout.is_fenced(self.root, self.shard, self.run):
            raise FencedError(
                f"{self.root}: a newer run of this job writes to it: wait for that one, or stop it "
                "and run again"
            )

    def start(self, tasks: Sequence[Task]) -> None:
        """Say which pairs are begun, so that a death can be blamed on them. Raises OutputError."""
        line = json.dumps({"keys": [task.key for task in tasks]}).encode() + b"\n"
        with layout.naming(self.root / layout.STARTED):
            self._started.write(line)

    def accept(
        self, task: Task, pictures: Mapping[str, bytes], row: Mapping[str, Any], recipe: Any
    ) -> None:
        """Write an accepted pair. pictures: kind -> PNG; row: what its row adds.

        Raises OutputError, FencedError.
        """
        files = layout.pictures_of(self.root, task.defect, task.number)
        self._write(task, ACCEPTED, files, pictures, row, recipe)

    def reject(
        self,
        task: Task,
        verdict: str,
        reason: str,
        pictures: Mapping[str, bytes] | None = None,
        row: Mapping[str, Any] | None = None,
        recipe: Any = None,
    ) -> None:
        """Set a pair aside, with what pictures it has. Raises OutputError, FencedError."""
        files = layout.quarantined(self.root, task.defect, task.number, task.attempt)
        said = {"reason": reason, **(row or {})}
        self._write(task, verdict, files, pictures or {}, said, recipe)

    def note(self, task: Task, verdict: str, reason: str = "") -> None:
        """A row without pictures."""
        self._append({"key": task.key, "verdict": verdict, "reason": reason, "time": time.time()})

    def _write(
        self,
        task: Task,
        verdict: str,
        files: Mapping[str, Path],
        pictures: Mapping[str, bytes],
        row: Mapping[str, Any],
        recipe: Any,
    ) -> None:
        self.check_fence()
        self._place({files[kind]: content for kind, content in pictures.items()}, task)
        hashes = {kind: hashlib.sha256(content).hexdigest() for kind, content in pictures.items()}
        own = {} if recipe is None else {"recipe": self._recipe(recipe)}
        self._append(
            {
                "key": task.key, "verdict": verdict, **row, **own, "sha256": hashes,
                "time": round(time.time(), 3),
            }
        )  # fmt: skip

    def _place(self, contents: Mapping[Path, bytes], task: Task) -> None:
        """Write all files under other names, then give each its own."""
        scratch = self.root / layout.PARTIAL / self.name
        named: dict[Path, Path] = {}
        for target, content in contents.items():
            partial = scratch / f"{task.key.replace('/', '-')}-{target.parent.name}"
            named[target] = partial
            with layout.naming(target), partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # between the check and the names there are no seconds of writing
        self.check_fence()
        for target, partial in named.items():
            with layout.naming(target):
                try:
                    partial.replace(target)
                except FileNotFoundError:
                    if not partial.exists():
                        # a newer run has cleaned up
                        self.check_fence()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    partial.replace(target)
        for folder in {target.parent for target in named}:
            # the names, too, are on the disk before the row that lists them
            with layout.naming(folder):
                sync(folder)

    def _recipe(self, recipe: Mapping[str, Any]) -> str:
        """The hash under which the shared part of a recipe is kept."""
        shared = {name: value for name, value in recipe.items() if name not in _PER_PAIR}
        text = json.dumps(shared, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        with self._lock:
            path = self.root / layout.RECIPES / f"{name}.json"
            if name not in self._recipes and not path.exists():
                layout.put_json(self.root, self.name, f"{layout.RECIPES}/{name}.json", shared)
            self._recipes.add(name)
        return name

    def _append(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with self._lock, layout.naming(self.part):
            end = self._rows.tell()
            try:
                # a nearly full disk takes a part and refuses the rest
                while line:
                    line = line[self._rows.write(line) :]
                os.fsync(self._rows.fileno())
                self._counts[Task.of_key(row["key"]).defect][row["verdict"]] += 1
            except OSError:
                with suppress(OSError):
                    self._rows.truncate(end)
                    self._rows.seek(end)
                raise

    def close(self) -> None:
        """End the part; what is empty goes."""
        for file, folder in ((self._rows, layout.PARTS), (self._started, layout.STARTED)):
            empty = not file.tell()
            file.close()
            with suppress(OSError):
                if empty:
                    (self.root / folder / f"{self.name}.jsonl").unlink()
        with suppress(OSError):
            (self.root / layout.PARTIAL / self.name).rmdir()
