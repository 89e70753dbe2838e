"""Workers of this machine: who draws what, who is alive, and which pair ended whom."""

from __future__ import annotations

import json
import selectors
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Queue, Shard, Task
from dualdiff_engine.dataset.process import AHEAD, Process
from dualdiff_engine.dataset.rows import (
    ACCEPTED,
    CRASH,
    FAILED,
    HANG,
    MOST_DEATHS,
    State,
    rows_of,
)
from dualdiff_engine.dataset.store import Writer
from dualdiff_engine.errors import OutputError

# a worker that has nothing to say is looked at so often, in seconds
TICK = 0.25
# a model loads, kernels are measured: longer than a step
STARTING = 1800.0
# deaths in a row of workers that had begun no pair, and pairs in a row that raise
MOST_EARLY, MOST_RAISED = 3, 3
# seconds that workers have to end by themselves when all is done
ENDING = 60.0


@dataclass
class Outcome:
    """What a run did. drawn, rejected: pairs by verdict. raised: defect -> the last error."""

    drawn: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    raised: dict[str, str] = field(default_factory=dict)
    deaths: int = 0


class Supervisor:
    """Hands out the queue to worker processes until it is empty.

    Args:
        root, run, shard: The dataset, the run's id, and the part of the work.
        queue: What is left to draw.
        state: Accepted pairs and deaths that are known; it is not changed.
        devices: One per worker.
        painter: "module:class" that workers draw with.
        on_row: Called with each pair's key and verdict.
    """

    def __init__(
        self,
        job: Job,
        writer: Writer,
        shard: Shard,
        queue: Queue,
        state: State,
        devices: Sequence[str],
        painter: str,
        threads: int,
        on_row: Callable[[Task, str], None],
    ) -> None:
        self.job, self.writer, self.queue, self.state = job, writer, queue, state
        # the rows of this run's deaths are read into the state at its end
        self._deaths = state.deaths.copy()
        self.outcome = Outcome()
        self._chosen = {
            "root": str(Path(job.out).resolve()), "run": writer.run, "shard": shard.name,
            "painter": painter,
        }  # fmt: skip
        self._devices, self._threads, self._on_row = devices, threads, on_row
        self._workers: list[Process] = []
        self._selector = selectors.DefaultSelector()
        self._count = self._early = 0
        self._raised: Counter[str] = Counter()
        self._stopping = False
        self._fatal: str | None = None

    def stop(self) -> None:
        """End after the current step of every worker; finished pairs are written."""
        self._stopping = True

    def run(self) -> Outcome:
        """Draw. Raises OutputError and others for what no worker can go on with."""
        try:
            for device in self._devices[: len(self.queue)]:
                self._start(device)
            while self._workers:
                self._step()
        finally:
            for worker in self._workers:
                worker.kill()
                worker.ended()
            self._selector.close()
        if self._fatal is not None:
            raise OutputError(self._fatal)
        return self.outcome

    def _step(self) -> None:
        for key, _ in self._selector.select(TICK):
            worker: Process = key.data
            said = worker.messages()
            for message in said or ():
                self._heard(worker, message)
            if said is None:
                self._gone(worker)
        busy = any(worker.open or not worker.ready for worker in self._workers)
        over = self._stopping or self._fatal is not None or not (self.queue or busy)
        for worker in list(self._workers):
            if over:
                worker.stop()
            elif worker.ready:
                self._feed(worker)
            self._look(worker, over)

    def _feed(self, worker: Process) -> None:
        while worker.leases < AHEAD:
            others = [w.defect for w in self._workers if w is not worker and w.defect]
            tasks, alone = self.queue.take(worker.batch, worker.defect, others)
            if not tasks:
                return
            worker.give(tasks, alone)

    def _look(self, worker: Process, over: bool) -> None:
        """End a worker that gives no sign of life."""
        owes = worker.open or not worker.ready or over
        limit = self.job.limits.hang if worker.ready else max(STARTING, self.job.limits.hang)
        if over and not self._stopping:
            limit = min(limit, ENDING)
        if owes and time.monotonic() - worker.heard > limit:
            worker.hangs = True
            worker.kill()

    def _start(self, device: str) -> None:
        name = f"{self.writer.run}-{self._count}"
        self._count += 1
        worker = Process.start(name, device, self._chosen, self._threads)
        self._workers.append(worker)
        self._selector.register(worker.output, selectors.EVENT_READ, worker)

    def _heard(self, worker: Process, message: dict[str, Any]) -> None:
        if "ready" in message:
            worker.ready, worker.batch = True, message["ready"]["batch"]
        elif "row" in message:
            self._row(worker, *message["row"])
        elif "failed" in message:
            self._failed(worker, *message["failed"])
        elif "done" in message:
            worker.leases -= 1
            self._early = 0
        elif "fatal" in message:
            self._fatal = self._fatal or message["fatal"]

    def _row(self, worker: Process, key: str, verdict: str) -> None:
        task = worker.open.pop(key, None)
        if task is None:
            return
        if verdict == ACCEPTED:
            self.outcome.drawn[task.defect] += 1
        else:
            self.outcome.rejected[verdict] += 1
            if task.attempt + 1 < self.job.limits.attempts:
                self.queue.put(task.again)
        self._on_row(task, verdict)

    def _failed(self, worker: Process, keys: list[str], why: str) -> None:
        """A batch raised: its pairs are tried alone; a pair that raises alone is left out."""
        tasks = [worker.open.pop(key) for key in keys if key in worker.open]
        if len(keys) > 1:
            for task in tasks:
                self.queue.put_alone(task)
            return
        for task in tasks:
            self._raised[task.defect] += 1
            self.outcome.raised[task.defect] = why
            self._on_row(task, FAILED)
            # what is wrong with all pairs is no pair's fault
            good = self.outcome.drawn[task.defect] or self.state.accepted[task.defect]
            if self._raised[task.defect] >= MOST_RAISED and not good:
                self._fatal = self._fatal or f"{task.defect}: {why}"

    def _gone(self, worker: Process) -> None:
        """A worker ended: its pairs go back, and those it had begun are looked at."""
        self._selector.unregister(worker.output)
        self._workers.remove(worker)
        how = worker.ended()
        part = self.writer.root / layout.PARTS / f"{worker.writer}.jsonl"
        for row in rows_of(part) if part.is_file() else ():
            # written, and then there was nobody to tell
            if row["verdict"] != FAILED:
                self._row(worker, row["key"], row["verdict"])
        if self._stopping or self._fatal is not None or worker.told_to_stop:
            return
        self.outcome.deaths += 1
        begun = self._begun(worker)
        for key, task in worker.open.items():
            if key in begun:
                self._suspect(task, HANG if worker.hangs else CRASH, how)
            else:
                self.queue.put(task)
        self._early = 0 if begun else self._early + 1
        if self._early >= MOST_EARLY:
            self._fatal = f"workers end before they draw ({how}): see the messages above"
        elif self.queue:
            self._start(worker.device)

    def _begun(self, worker: Process) -> set[str]:
        """Keys of pairs that it had begun and not written."""
        path = self.writer.root / layout.STARTED / f"{worker.writer}.jsonl"
        if not path.is_file():
            return set()
        keys: set[str] = set()
        for line in path.read_bytes().split(b"\n")[:-1]:
            keys |= set(json.loads(line)["keys"])
        return keys & worker.open.keys()

    def _suspect(self, task: Task, verdict: str, how: str) -> None:
        """A worker ended over this pair: try it alone, or set it aside."""
        self._deaths[task.key] += 1
        self.writer.note(task, "death", how)
        if self._deaths[task.key] < MOST_DEATHS:
            self.queue.put_alone(task)
            return
        what = "gave no sign of life" if verdict == HANG else f"ended ({how})"
        self.writer.reject(task, verdict, f"its worker {what}, and so did the one before")
        self.outcome.rejected[verdict] += 1
        self._on_row(task, verdict)
