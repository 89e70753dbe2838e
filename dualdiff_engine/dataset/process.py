"""A worker's process, as its supervisor sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dualdiff_engine.dataset.plan import Task

# batches that a worker has been told of: one that it draws, and the next
AHEAD = 2


@dataclass
class Process:
    """Started with `start`. open: key -> pair that was handed out and has no row yet."""

    writer: str
    device: str
    child: subprocess.Popen[bytes]
    ready: bool = False
    batch: int = 1
    leases: int = 0
    defect: str | None = None
    open: dict[str, Task] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    hangs: bool = False
    told_to_stop: bool = False
    _rest: bytes = b""

    @classmethod
    def start(cls, writer: str, device: str, chosen: Mapping[str, Any], threads: int) -> Process:
        """chosen: what `worker.main` takes. threads: of a CPU; 0: PyTorch's own choice."""
        environment = dict(os.environ)
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        command = [sys.executable, "-m", "dualdiff_engine.dataset.worker"]
        child = subprocess.Popen(  # noqa: S603
            [*command, json.dumps({**chosen, "writer": writer, "device": device})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C is for the supervisor, which then asks for an end
            start_new_session=True,
        )
        os.set_blocking(child.stdout.fileno(), False)  # type: ignore[union-attr]
        return cls(writer, device, child)

    @property
    def output(self) -> int:
        """The descriptor that its messages come from."""
        assert self.child.stdout is not None
        return self.child.stdout.fileno()

    def give(self, tasks: list[Task], alone: bool) -> None:
        """Hand out a batch."""
        if not self.open:
            # it was idle, and owed no sign of life
            self.heard = time.monotonic()
        self.open |= {task.key: task for task in tasks}
        self.leases += 1
        self.defect = tasks[0].defect
        self._tell({"draw": [task.key for task in tasks], "alone": alone})

    def stop(self) -> None:
        """Ask for an end after the current step."""
        if not self.told_to_stop:
            self.told_to_stop = True
            self._tell({"stop": True})

    def messages(self) -> list[dict[str, Any]] | None:
        """What it said; None when it has ended."""
        try:
            content = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return []
        if not content:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def kill(self) -> None:
        """End it now, with what it started."""
        with suppress(OSError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.kill()

    def ended(self) -> str:
        """Waits for its end; says how it came."""
        code = self.child.wait()
        for pipe in (self.child.stdin, self.child.stdout):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        if code < 0:
            with suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"

    def _tell(self, message: Mapping[str, Any]) -> None:
        # its death is told by the end of its output
        with suppress(OSError):
            self.child.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            self.child.stdin.flush()  # type: ignore[union-attr]
