"""A worker's signs of life, and its counts, in a file that `status` reads."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from dualdiff_engine.dataset import layout
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.dataset.store import Writer
from dualdiff_engine.errors import OutputError

# seconds between two looks at whether there is something to write, and between two writings
TICK, REST = 1.0, 10.0
# accepted pairs that the rate is taken of
RECENT = 64


class Signs:
    """Thread-safe; a thread of its own writes `workers/WRITER.json`."""

    def __init__(self, writer: Writer, device: str) -> None:
        self._writer, self._device = writer, device
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, str]] = deque(maxlen=RECENT)
        self._began = self._alive = time.time()
        self._drawing, self._waited, self._ended = 0, 0.0, False
        self._changed = threading.Event()
        self._over = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """A step was made."""
        self._alive = time.time()
        self._changed.set()

    def batch(self, tasks: Sequence[Task]) -> None:
        """A batch is begun."""
        self._drawing = len(tasks)
        self.beat()

    def row(self, defect: str, verdict: str) -> None:
        """A row was written."""
        with self._lock:
            self._recent.append((round(time.time(), 3), f"{defect} {verdict}"))
        self.beat()

    def waited(self, seconds: float) -> None:
        """The device waited for room in the queue."""
        self._waited += seconds

    def close(self) -> None:
        """Write the last counts."""
        self._over.set()
        self._thread.join()
        self._ended = True
        self._write()

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK):
            if self._changed.is_set() or time.monotonic() - last > REST:
                self._changed.clear()
                self._write()
                last = time.monotonic()

    def _write(self) -> None:
        offset, counts = self._writer.counted()
        with self._lock:
            said: dict[str, Any] = {
                "run": self._writer.run,
                "part": self._writer.part.name,
                "offset": offset,
                "counts": counts,
                "recent": list(self._recent),
                "began": self._began,
                "time": self._alive,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "device": self._device,
                "drawing": self._drawing,
                "waited": round(self._waited, 3),
                "ended": self._ended,
            }
        # a full disk is told by the pairs that cannot be written
        with suppress(OutputError):
            name = f"{layout.WORKERS}/{self._writer.name}.json"
            layout.put_json(self._writer.root, self._writer.name, name, said, keep=False)
