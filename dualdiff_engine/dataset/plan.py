"""Which pairs are to be drawn: their numbers, keys and seeds, all functions of the job alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import TYPE_CHECKING

from dualdiff_engine.errors import SettingsError

if TYPE_CHECKING:
    from dualdiff_engine.dataset.inputs import Source

_MOST_SHARDS = 100_000


def seed_of(job_seed: int, product: str, defect: str, number: int, attempt: int) -> int:
    """A pair's seed, 0 to 2^63-1: another for every pair and attempt, the same on every machine."""
    parts = json.dumps([job_seed, product, defect, number, attempt])
    return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, order=True)
class Task:
    """A pair to draw. defect: product/defect; attempt: from 0."""

    defect: str
    number: int
    attempt: int = 0

    @property
    def key(self) -> str:
        """The name that it has in every row: bottle/broken/000012.0"""
        return f"{self.defect}/{self.number:06d}.{self.attempt}"

    @property
    def again(self) -> Task:
        """The next attempt."""
        return replace(self, attempt=self.attempt + 1)

    def seed(self, job_seed: int) -> int:
        """See `seed_of`."""
        product, _, defect = self.defect.partition("/")
        return seed_of(job_seed, product, defect, self.number, self.attempt)

    @classmethod
    def of_key(cls, key: str) -> Task:
        """Raises SettingsError for what is no key."""
        match = re.fullmatch(r"([^/]+/[^/]+)/(\d{6})\.(\d{1,3})", key)
        if match is None:
            raise SettingsError(f"{key[:80]!r} is no key of a pair, such as bottle/broken/000012.0")
        return cls(match[1], int(match[2]), int(match[3]))


@dataclass(frozen=True)
class Shard:
    """A part of the work: every `of`-th number from `index` on."""

    index: int = 0
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Of "0/4". Raises SettingsError."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not int(match[1]) < int(match[2]) <= _MOST_SHARDS:
            raise SettingsError(
                f"--shard {text!r}: write i/n with i from 0 to n-1, such as 0/4 for the first of "
                "four"
            )
        return cls(int(match[1]), int(match[2]))

    def numbers(self, pairs: int) -> range:
        """Those of its pairs."""
        return range(self.index, pairs, self.of)

    @property
    def name(self) -> str:
        """As a file's: 0-of-4."""
        return f"{self.index}-of-{self.of}"


def lines(sources: Iterable[Source], job_seed: int) -> Iterator[bytes]:
    """`plan.jsonl`: every pair's first attempt."""
    for source in sources:
        for number in range(source.spec.pairs):
            task = Task(source.name, number)
            row = {"key": task.key, "number": number, "seed": task.seed(job_seed)}
            if source.pictures:
                row["picture"] = source.pictures[source.picture_of(number)].name
            yield json.dumps(row, ensure_ascii=False).encode() + b"\n"


class Queue:
    """What is left to draw, handed out in batches of one defect, its pictures together.

    A batch with a pair that may have killed its worker is that pair alone.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._picture: dict[str, Callable[[int], int]] = {s.name: s.picture_of for s in sources}
        self._left: dict[str, list[tuple[int, Task]]] = {s.name: [] for s in sources}
        self._alone: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._alone) + sum(map(len, self._left.values()))

    def put(self, task: Task) -> None:
        """Add a pair."""
        heappush(self._left[task.defect], (self._picture[task.defect](task.number), task))

    def put_alone(self, task: Task) -> None:
        """Add a pair that is drawn by itself."""
        self._alone.append(task)

    def take(self, count: int, last: str | None, others: Iterable[str]) -> tuple[list[Task], bool]:
        """At most `count` pairs, and whether they are suspects, which are drawn alone.

        last: the defect that the worker drew before, whose adapter it holds. others: those that
        other workers draw, which are taken last.
        """
        if self._alone:
            return [self._alone.popleft()], True
        left = [name for name, tasks in self._left.items() if tasks]
        if not left:
            return [], False
        busy = set(others)
        defect = last if last in left else min(left, key=lambda name: name in busy)
        tasks = self._left[defect]
        return [heappop(tasks)[1] for _ in range(min(count, len(tasks)))], False
