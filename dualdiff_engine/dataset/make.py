"""A job, from its checks to its last pair: what `dualdiff make` does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import exports, inputs, job_file, layout, plan, rows, status
from dualdiff_engine.dataset.formats import Exported
from dualdiff_engine.dataset.gates import Gate
from dualdiff_engine.dataset.inputs import Checked
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Queue, Shard, Task
from dualdiff_engine.dataset.rows import BY_HAND, State
from dualdiff_engine.dataset.store import Writer
from dualdiff_engine.dataset.supervisor import Outcome, Supervisor
from dualdiff_engine.dataset.worker import PAINTER
from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.files import require_space, sync
from dualdiff_engine.pair import differences

FORMAT = 1
_REJECTED = re.compile(r"([^/]+/[^/]+)/(?:image/)?(\d{6})(?:\.png|\.(\d{1,3}))?")


@dataclass
class Made:
    """What a run left. wanted, accepted: defect -> pairs of the shard; outcome: of this run."""

    wanted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    outcome: Outcome = field(default_factory=Outcome)
    killed: int = 0

    @property
    def missing(self) -> dict[str, int]:
        """Defect -> pairs that are still wanted."""
        left = {name: self.wanted[name] - self.accepted[name] for name in self.wanted}
        return {name: count for name, count in left.items() if count}


class Maker:
    """A checked job and what its folder holds.

    Building it checks everything and writes nothing. left: pairs to draw. state: what is there.
    Raises SettingsError, AdapterError, BaseModelError, DataError, OutputError.
    """

    def __init__(self, job: Job, shard: Shard | None = None) -> None:
        self.job, self.shard = job, shard or Shard()
        exports.check(job)
        self.checked: Checked = inputs.check(job)
        for source in self.checked.sources:
            Gate.of(job.gates, source)
        self.root = Path(job.out)
        self._refuse_others()
        self.state = rows.union(self.root)
        self.devices = devices_of(job)

    def left(self) -> list[Task]:
        """The pairs to draw, as far as is known: gates may ask for more."""
        found = []
        for source in self.checked.sources:
            numbers = self.shard.numbers(source.spec.pairs)
            tasks = (self.state.next_of(source.name, n, self._attempts) for n in numbers)
            found += [task for task in tasks if task is not None]
        return found

    @property
    def _attempts(self) -> int:
        return self.job.limits.attempts

    def space(self) -> int:
        """Bytes that the pairs to draw may take."""
        return sum(self.checked.bytes_per_pair[task.defect] for task in self.left())

    def seconds_per_pair(self) -> float | None:
        """Of the latest run's workers together, for an accepted pair; None without one."""
        if not (self.root / layout.RUN).is_file():
            return None
        return status.pace(self.root)

    def run(
        self,
        *,
        reject: Path | None = None,
        painter: str = PAINTER,
        on_row: Callable[[Task, str], None] = lambda task, verdict: None,
        started: Callable[[Supervisor, int], None] = lambda supervisor, left: None,
    ) -> Made:
        """Draw what is missing.

        Args:
            reject: File with a pair per line that is set aside before.
            painter: What workers draw with.
            on_row: Called with every pair's task and verdict.
            started: Called with the supervisor, which can be stopped, and how many pairs are left.

        Raises:
            OutputError: The folder cannot be written, or a newer run has taken over.
        """
        require_space(self.root, self.space(), "the pairs")
        by_hand = _rejected(reject, self.state, self.checked) if reject else []
        layout.make_folders(self.root)
        run = secrets.token_hex(6)
        writer = Writer(self.root, run, f"{run}-d", self.shard.name)
        outcome = Outcome()
        try:
            self._begin(writer, by_hand)
            if tasks := self.left():
                supervisor = Supervisor(
                    self.job, writer, self.shard, self._queue(tasks), self.state, self.devices,
                    painter, threads_of(self.devices), on_row,
                )  # fmt: skip
                started(supervisor, len(tasks))
                outcome = supervisor.run()
        finally:
            self._end(writer)
        return self._made(outcome)

    def export(self) -> Iterator[tuple[str, Exported | None]]:
        """Write the job's formats, if every pair of every shard is there; see `export_all`."""
        own = self.state.accepted
        wanted = {source.name: source.spec.pairs for source in self.checked.sources}
        accepted = {
            name: {number: own[name][number] for number in range(count) if number in own[name]}
            for name, count in wanted.items()
        }
        if all(len(accepted[name]) == count for name, count in wanted.items()):
            yield from exports.export_all(self.job, accepted)

    def _begin(self, writer: Writer, by_hand: list[Task]) -> None:
        """Take the folder over from older runs, and write what this one is."""
        whole = self.shard.of == 1
        layout.set_fence(self.root, writer.name, self.shard.name, writer.run, whole=whole)
        layout.remove_dead(self.root)
        with layout.naming(self.root / layout.STORE):
            for source in self.checked.sources:
                for top in (layout.STORE, layout.QUARANTINE):
                    _make_folders(self.root / top, source.name)
        self._write_plan(writer)
        # what older workers wrote until now counts
        rows.refresh(self.root, self.state)
        for task in by_hand:
            _set_aside(self.root, writer, task)
        if by_hand:
            rows.refresh(self.root, self.state)
        self._write_tally(writer)

    def _write_plan(self, writer: Writer) -> None:
        known = layout.read_json(self.root / layout.RUN) or {}
        sources, seed = self.checked.sources, self.job.seed
        outline = [[s.name, s.spec.pairs, [p.name for p in s.pictures]] for s in sources]
        digest = hashlib.sha256(json.dumps([seed, outline]).encode()).hexdigest()
        if known.get("plan") != digest or not (self.root / layout.PLAN).is_file():
            layout.put(self.root, writer.name, layout.PLAN, plan.lines(sources, seed))
        layout.put(self.root, writer.name, layout.JOB, [job_file.stored(self.job)])
        defects = {**known.get("defects", {}), **self.checked.identities}
        said = {"format": FORMAT, "plan": digest, "defects": defects}
        layout.put_json(self.root, writer.name, layout.RUN, said)

    def _write_tally(self, writer: Writer) -> None:
        layout.put_json(self.root, writer.name, layout.TALLY, self.state.tally())

    def _end(self, writer: Writer) -> None:
        """Count what is there; a full disk keeps nobody from leaving."""
        with suppress(OutputError):
            rows.refresh(self.root, self.state)
            if not layout.is_fenced(self.root, self.shard.name, writer.run):
                self._write_tally(writer)
        writer.close()

    def _queue(self, tasks: list[Task]) -> Queue:
        queue = Queue(self.checked.sources)
        for task in tasks:
            # it may have ended a worker before
            add = queue.put_alone if self.state.deaths[task.key] else queue.put
            add(task)
        return queue

    def _made(self, outcome: Outcome) -> Made:
        made = Made(outcome=outcome)
        for source in self.checked.sources:
            numbers, own = self.shard.numbers(source.spec.pairs), self.state.accepted[source.name]
            made.wanted[source.name] = len(numbers)
            made.accepted[source.name] = sum(number in own for number in numbers)
            made.killed += sum(n in self.state.killers[source.name] for n in numbers)
        return made

    def _refuse_others(self) -> None:
        """Raises OutputError when pairs that are there were drawn in another way."""
        known = layout.read_json(self.root / layout.RUN)
        if known is None:
            return
        if not isinstance(known, dict) or known.get("format") != FORMAT:
            raise OutputError(f"{self.root} was made by another version: choose another out")
        for name, own in self.checked.identities.items():
            theirs = known.get("defects", {}).get(name)
            if theirs is None:
                continue
            ours, those = _texts(own), _texts(theirs)
            if others := differences(ours, those):
                raise OutputError(
                    f"{self.root} holds pairs of {name} that were drawn otherwise (other "
                    f"{', '.join(others)}): choose another out, or restore the job"
                )


def _texts(identity: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value, sort_keys=True) for name, value in identity.items()}


def _make_folders(top: Path, defect: str) -> None:
    """Folders of a defect, on the disk with their names."""
    for kind in layout.KINDS:
        path = top / defect / kind
        for folder in (path, path.parent, path.parent.parent):
            if folder.is_symlink():
                raise OutputError(f"{folder} is a symbolic link: choose another out")
        path.mkdir(parents=True, exist_ok=True)
    for folder in (top / defect, (top / defect).parent, top):
        sync(folder)


def devices_of(job: Job) -> list[str]:
    """The device of each worker. Raises SettingsError."""
    from dualdiff_engine.device import device_of

    chosen = job.engine.device
    device = device_of(chosen)
    if device.type != "cuda" or device.index is not None:
        own = [str(device)]
    else:
        import torch

        own = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    count = len(own) if job.workers == "auto" else job.workers
    return [own[n % len(own)] for n in range(count)]


def threads_of(devices: list[str]) -> int:
    """Threads of a worker where several share the CPU, else 0."""
    workers = devices.count("cpu")
    if workers < 2:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // workers)


def _rejected(path: Path, state: State, checked: Checked) -> list[Task]:
    """The accepted pairs that a file lists. Raises SettingsError."""
    names = {source.name for source in checked.sources}
    found = []
    with _reading(path) as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text.startswith("#"):
                continue
            match = _REJECTED.fullmatch(text)
            if match is None or match[1] not in names:
                raise SettingsError(
                    f"{path}, line {number}: {text[:80]!r} is no pair of the job: write "
                    "product/defect/NNNNNN, one a line"
                )
            attempt = state.accepted[match[1]].get(int(match[2]))
            # a line of an older gallery may mean an attempt that is gone
            if attempt is not None and (match[3] is None or int(match[3]) == attempt):
                found.append(Task(match[1], int(match[2]), attempt))
    return list(dict.fromkeys(found))


@contextmanager
def _reading(path: Path) -> Iterator[Iterator[str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path} is not UTF-8 text: save it as UTF-8") from error
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror}): check the path") from error


def _set_aside(root: Path, writer: Writer, task: Task) -> None:
    """Move an accepted pair to the quarantine; its row first, which makes it wanted again."""
    writer.note(task, BY_HAND, "rejected by hand")
    there = layout.pictures_of(root, task.defect, task.number)
    aside = layout.quarantined(root, task.defect, task.number, task.attempt)
    for kind, path in there.items():
        with layout.naming(aside[kind]):
            path.replace(aside[kind])
