"""A process that tries faults, each in a child of its own, and says what came of it.

`Lab` starts this file as a program. It imports and prepares everything once, on one thread; a try
is then a fork, so that a crash, a hang or a flood of memory stays with one fault.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# a process may take so many seconds of a processor; `Kind.seconds` is the time on the clock, long
# enough for a machine that others use
CPU_SECONDS = 10
# a try may take so much more memory than the engine, and is stopped at twice that
MEMORY = 1536 << 20

RESULT, REFUSED = "result", "refused"
# ends that no fault may have
WRONG, CRASH, HANG, MEMORY_END = "wrong result", "crash", "hang", "too much memory"

ONE_THREAD = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Try:
    """One fault that was tried.

    end: `result`, `refused`, or what must not happen. message: the refusal, or why the end is
    wrong. seconds: of a processor, children included. mib: above what the engine itself takes.
    """

    kind: str
    seed: int
    fault: str
    end: str
    message: str
    seconds: float
    mib: float


class Lab:
    """The process. A context manager; `work`: a folder that it may fill."""

    def __init__(self, work: Path, at_once: int = 1) -> None:
        self.work = work
        self._arguments = [sys.executable, __file__, str(work), str(at_once)]

    def __enter__(self) -> Lab:
        environment = {**os.environ, **ONE_THREAD}
        # Python finds helpers next to the file that it runs
        self._process = subprocess.Popen(
            self._arguments,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def tries(self, kind: str, seeds: Sequence[int]) -> list[Try]:
        """What came of the faults of a kind, by seed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, list(seeds)]) + "\n")
        self._process.stdin.flush()
        lines = [self._process.stdout.readline() for _ in seeds]
        assert all(lines), f"the lab ended with exit code {self._process.wait()}"
        return sorted((Try(**json.loads(line)) for line in lines), key=lambda t: t.seed)


# --- the process itself -----------------------------------------------------------------------


@dataclass
class _Child:
    seed: int
    pid: int
    pipe: int
    folder: Path
    started: float
    said: bytes = b""


def _serve(work: Path, at_once: int) -> None:
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import disturbed_kinds
    import fault_kinds

    torch.set_num_threads(1)
    known = fault_kinds.KINDS | disturbed_kinds.KINDS
    kinds: dict[str, Any] = {}
    for line in sys.stdin:
        name, seeds = json.loads(line)
        if name not in kinds:
            folder = work / name
            folder.mkdir(parents=True)
            kinds[name] = known[name](folder)
        for result in _tried(name, kinds[name], seeds, at_once):
            answers.write(json.dumps(asdict(result)) + "\n")
            answers.flush()


def _tried(name: str, kind: Any, seeds: list[int], at_once: int) -> Iterator[Try]:
    waiting, running = list(seeds), dict[int, _Child]()
    while waiting or running:
        while waiting and len(running) < at_once:
            child = _start(kind, waiting.pop(0))
            running[child.pipe] = child
        ready, _, _ = select.select(list(running), [], [], 1)
        for pipe in ready:
            part = os.read(pipe, 1 << 16)
            running[pipe].said += part
            if not part:
                yield _ended(name, running.pop(pipe))
        for child in running.values():
            if time.monotonic() > child.started + kind.seconds:
                os.killpg(child.pid, signal.SIGKILL)


def _start(kind: Any, seed: int) -> _Child:
    folder = kind.folder / str(seed)
    folder.mkdir()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        # grandchildren that outlive a killed try go with it
        os.setpgid(0, 0)
        code = 1
        try:
            _try(kind, seed, folder, write)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    return _Child(seed, pid, read, folder, time.monotonic())


def _ended(name: str, child: _Child) -> Try:
    _, status, used = os.wait4(child.pid, 0)
    os.close(child.pipe)
    shutil.rmtree(child.folder, ignore_errors=True)
    seconds = used.ru_utime + used.ru_stime
    lines = child.said.splitlines()
    fault = json.loads(lines[0]) if lines else "not damaged yet"
    if len(lines) < 2:
        code = os.waitstatus_to_exitcode(status)
        killed = -code in (signal.SIGKILL, signal.SIGXCPU)
        end = (HANG, "no end in time") if killed else (CRASH, f"the process ended with {code}")
        return Try(name, child.seed, fault, *end, seconds, 0.0)
    end, message, mib = json.loads(lines[1])
    if end in (RESULT, REFUSED) and mib > MEMORY >> 20:
        end = MEMORY_END
    return Try(name, child.seed, fault, end, message, seconds, mib)


def _try(kind: Any, seed: int, folder: Path, pipe: int) -> None:
    """In the child: two lines into the pipe, what was done and what came of it."""
    from dualdiff_engine.errors import AdapterError, DataError, DualDiffError

    fault = kind.damage(seed, folder)
    os.write(pipe, json.dumps(fault).encode() + b"\n")
    before = _memory("VmRSS")
    # the peak starts again here: writing a file that unpacks to gigabytes is not the engine's fault
    Path("/proc/self/clear_refs").write_text("5")
    limit = _memory("VmSize") + 2 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    spent = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    try:
        end, message = RESULT, kind.use(seed, folder) or ""
    except DualDiffError as error:
        end, message = REFUSED, str(error)
        # these list faults, or hold a command to be copied
        if "\n" in message and not isinstance(error, AdapterError | DataError):
            end = WRONG
    except AssertionError as error:
        end, message = WRONG, str(error) or traceback.format_exc()
    except BaseException:
        end, message = CRASH, traceback.format_exc()
    mib = max(0, _memory("VmHWM") - before) / (1 << 20)
    os.write(pipe, json.dumps([end, message, mib]).encode() + b"\n")


def _memory(name: str) -> int:
    """Bytes, as Linux counts them for this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise LookupError(name)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
