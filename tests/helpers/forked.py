"""Workers that are forked instead of started: a new interpreter would load PyTorch each time."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, NoReturn


class ForkedWorker:
    """What `dataset.process` uses of `subprocess.Popen`."""

    def __init__(self, command: list[str], **_: Any) -> None:
        read, self.stdin = _pipe("wb")
        out, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            self.stdin.close()
            _run(command, read, write)
        os.close(read)
        os.close(write)
        self.stdout = os.fdopen(out, "rb", 0)
        self._code: int | None = None

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _pipe(mode: str) -> tuple[int, io.FileIO]:
    read, write = os.pipe()
    return read, os.fdopen(write, mode, 0)  # type: ignore[return-value]


def _run(command: list[str], read: int, write: int) -> NoReturn:
    code = 1
    try:
        os.setsid()
        os.dup2(read, 0)
        os.dup2(write, 1)
        # ends of pipes of other workers, which would never see theirs
        os.closerange(3, 256)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.argv = command[2:]
        from dualdiff_engine.dataset import worker

        code = worker.main()
    finally:
        os._exit(code)
