"""A worker: draws the batches that it is told, and finishes pairs in threads beside the device.

A process of its own, started by the supervisor: lines of JSON come in on standard input and go out
on standard output. The end of the input is the supervisor's death: then nothing more is drawn.

    in   {"draw": [key, …], "alone": bool}    {"stop": true}
    out  {"ready": {batch, device}}  {"beat": 1}  {"row": [key, verdict]}  {"failed": [key, why]}
         {"done": how many}  {"fatal": why}
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import job_file, layout
from dualdiff_engine.dataset.gates import Gate, scores_of
from dualdiff_engine.dataset.inputs import sources
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.rows import ACCEPTED, FAILED
from dualdiff_engine.dataset.signs import Signs
from dualdiff_engine.dataset.store import FencedError, Writer
from dualdiff_engine.errors import DualDiffError, OutOfMemoryError, OutputError
from dualdiff_engine.folder_writer import KINDS, png_of
from dualdiff_engine.pair import Fault, Pair
from dualdiff_engine.pipeline.faults import kind_of

PAINTER = "dualdiff_engine.dataset.painter:EnginePainter"
# threads beside the device: a picture is compressed while another waits for the disk
THREADS = 2
# exit code of a worker whose GPU can only be used again by another process
LOST = 70


class Worker:
    """Draws, finishes and commits. send: takes a message to the supervisor, from any thread."""

    def __init__(
        self, job: Job, writer: Writer, painter: Any, send: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.job, self.writer, self.painter, self.send = job, writer, painter, send
        found = {source.name: source for source in sources(job)}
        self._sources = found
        self._gates = {name: Gate.of(job.gates, source) for name, source in found.items()}
        self.signs = Signs(writer, painter.device)
        self.stopped = threading.Event()
        self._fatal: Exception | None = None
        self._pool = ThreadPoolExecutor(THREADS, "finish")
        # pairs that were drawn and are not on the disk: no more than a batch
        self._room = threading.BoundedSemaphore(max(painter.batch, THREADS))
        self._pending = 0
        self._idle = threading.Condition()

    def stop(self) -> None:
        """End the batch after its step; finished pairs are written."""
        self.stopped.set()
        self.painter.interrupt()

    def draw(self, tasks: Sequence[Task], alone: bool) -> None:
        """Draw a batch. alone: no other pair is begun, so that a death has one cause.

        Raises OutputError, OutOfMemoryError: the run cannot go on.
        """
        if alone:
            self._drain()
        self.writer.check_fence()
        self.writer.start(tasks)
        by_seed = {task.seed(self.job.seed): task for task in tasks}
        self.signs.batch(tasks)
        try:
            stream = self.painter.draw(tasks, self._beat, self._fault(by_seed, len(tasks)))
            for finish in stream:
                self._submit(finish, by_seed, len(tasks))
        except (OutputError, OutOfMemoryError):
            raise
        except Exception as error:
            self._check()
            self._failed(error, tasks)
        if alone:
            self._drain()
        self._check()
        self.send({"done": len(tasks)})

    def _beat(self) -> None:
        self.signs.beat()
        self.send({"beat": 1})

    def _fault(self, by_seed: Mapping[int, Task], batch: int) -> Callable[[Fault], None]:
        def set_aside(fault: Fault) -> None:
            task, verdict = by_seed[fault.seed], kind_of(fault.reason)
            row = {"seed": fault.seed, "batch": batch}
            self.writer.reject(task, verdict, fault.reason, None, row, fault.recipe)
            self._told(task, verdict)

        return set_aside

    def _failed(self, error: Exception, tasks: Sequence[Task]) -> None:
        """A batch that raised: each of its pairs is tried alone, then set aside until next time."""
        if self.painter.lost(error):
            os._exit(LOST)
        self._drain()
        why = str(error) if isinstance(error, DualDiffError) else f"{type(error).__name__}: {error}"
        why = " ".join(why.split())
        if len(tasks) == 1:
            self.writer.note(tasks[0], FAILED, why)
            self.signs.row(tasks[0].defect, FAILED)
        self.send({"failed": [[task.key for task in tasks], why]})

    def _submit(self, finish: Callable[[], Pair], by_seed: Mapping[int, Task], batch: int) -> None:
        waited = time.monotonic()
        self._room.acquire()
        self.signs.waited(time.monotonic() - waited)
        # before the pair counts as pending: it would be waited for
        self._check()
        with self._idle:
            self._pending += 1
        self._pool.submit(self._finish, finish, by_seed, batch)

    def _finish(self, finish: Callable[[], Pair], by_seed: Mapping[int, Task], batch: int) -> None:
        try:
            # after a failure nothing more is written; what was drawn is drawn again
            if self._fatal is None:
                pair = finish()
                self._commit(by_seed[pair.seed], pair, batch)
        except Exception as error:
            self._fatal = self._fatal or error
            self.painter.interrupt()
        finally:
            self._room.release()
            with self._idle:
                self._pending -= 1
                self._idle.notify_all()

    def _commit(self, task: Task, pair: Pair, batch: int) -> None:
        """Judge a pair and write it."""
        scores = scores_of(pair)
        verdict, reason = self._gates[task.defect].verdict(pair, scores)
        pictures = {kind: png_of(pair, kind) for kind in KINDS}
        row: dict[str, Any] = {"seed": pair.seed, "scores": scores, "batch": batch}
        row |= {name: pair.recipe[name] for name in ("mask", "window") if name in pair.recipe}
        source = self._sources[task.defect]
        if source.pictures:
            row["picture"] = source.pictures[source.picture_of(task.number)].name
        if verdict == ACCEPTED:
            self.writer.accept(task, pictures, row, pair.recipe)
        else:
            self.writer.reject(task, verdict, reason, pictures, row, pair.recipe)
        self._told(task, verdict)

    def _told(self, task: Task, verdict: str) -> None:
        self.signs.row(task.defect, verdict)
        self.send({"row": [task.key, verdict]})

    def _drain(self) -> None:
        """Wait until every pair that was drawn is on the disk."""
        with self._idle:
            self._idle.wait_for(lambda: self._pending == 0)

    def _check(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def close(self) -> None:
        """Write what was drawn, and leave. Raises what a thread met."""
        self._drain()
        self._pool.shutdown()
        self.signs.close()
        self.writer.close()
        self._check()


def _read_leases(worker: Worker, leases: queue.Queue[Any]) -> None:
    """What the supervisor says, until it says stop or is gone."""
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "stop" in message:
            break
        leases.put(message)
    worker.stop()
    leases.put(None)


def _serve(worker: Worker) -> None:
    leases: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read_leases, args=(worker, leases), daemon=True).start()
    ready = {"batch": worker.painter.batch, "device": worker.painter.device}
    worker.send({"ready": ready})
    while (message := leases.get()) is not None and not worker.stopped.is_set():
        worker.draw([Task.of_key(key) for key in message["draw"]], message["alone"])


def _sender() -> Callable[[Mapping[str, Any]], None]:
    """Messages go to what standard output was; what libraries print goes to standard error."""
    out, lock = os.dup(1), threading.Lock()
    os.dup2(2, 1)

    def send(message: Mapping[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with lock:
            try:
                while line:
                    line = line[os.write(out, line) :]
            except OSError:
                # nobody is there; the end of the input says so too
                return

    return send


def main() -> int:
    """argv[1]: root, run, writer, shard, device and painter as JSON. Returns the exit code."""
    chosen = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    send = _sender()
    try:
        root = Path(chosen["root"])
        job = job_file.parse(layout.read_json(root / layout.JOB), str(root / layout.JOB))
        module, _, name = chosen["painter"].partition(":")
        painter = getattr(importlib.import_module(module), name)(job, chosen["device"])
        writer = Writer(root, chosen["run"], chosen["writer"], chosen["shard"])
        worker = Worker(job, writer, painter, send)
        try:
            _serve(worker)
        finally:
            worker.close()
    except FencedError as error:
        send({"fatal": str(error)})
        return 1
    except DualDiffError as error:
        send({"fatal": str(error)})
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    # threads of libraries must not keep a process that is done
    sys.stderr.flush()
    os._exit(code)
