"""Runs of the command that are killed, or whose disk is full, read-only or under a quota.

Each is then continued by the same command, and what it leaves is compared with an undisturbed run.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fault_lab import ONE_THREAD
from support import DATA
from training_cases import DEFECT, SIZE

# of the command
DONE, FAILED = 0, 2
# <sched.h>, <sys/mount.h>
_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _RECURSIVE, _PRIVATE = 1, 32, 0x4000, 1 << 18


def generate_words(out: Path) -> list[str]:
    golden = DATA / "dual"
    return [
        *("generate", "--base", str(golden / "model"), "--adapter", str(golden / "adapter")),
        *("--allow-pickle", "--steps", "1", "--size", "32", "--batch", "2", "--seeds", "3:9"),
        *("--quiet", "--out", str(out)),
    ]


def train_words(data: Path, out: Path) -> list[str]:
    return [
        *("train", "--base", str(DATA / "bcm" / "model"), "--data", str(data), "--defect", DEFECT),
        *("--out", str(out), "--size", str(SIZE), "--rank", "4", "--blend-width", "12"),
        *("--batch", "2", "--background", "--text-encoder", "--steps", "6", "--flips", "none"),
        *("--learning-rate", "1e-3", "--checkpoint-every", "2", "--sample-every", "3"),
        *("--samples", "1", "--sample-steps", "1", "--quiet"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a finished run; a lock holds nothing."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def differences(seen: dict[str, bytes], wanted: dict[str, bytes]) -> list[str]:
    """Names of files that differ, are missing, or are too many."""
    return sorted(name for name in seen.keys() | wanted if seen.get(name) != wanted.get(name))


# --- the command in a child -------------------------------------------------------------------


def start(words: list[str], errors: Path, before: Callable[[], None] = lambda: None) -> int:
    """Fork, and run the command there; returns the process id. errors: takes its stderr."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        code = 70
        try:
            before()
            from dualdiff_engine.cli import main

            code = main(words)
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    """The exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(words: list[str], errors: Path) -> None:
    """Run the command to its end, which has to be a good one."""
    code = ended(start(words, errors))
    assert code == DONE, f"exit code {code}: {errors.read_text()}"


def kill_in_time(pid: int, come: Callable[[float], bool]) -> float | None:
    """SIGKILL as soon as `come(seconds passed)`; returns when that was, None if it ended before."""
    started = time.monotonic()
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        passed = time.monotonic() - started
        if come(passed):
            os.kill(pid, signal.SIGKILL)
            return passed if ended(pid) == -signal.SIGKILL else None
        time.sleep(0.0002)
    return None


def names_in(folder: Path) -> int:
    """How many names lie in a folder and its folders; a run at work adds and removes some."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


class Moment:
    """A random time of a run, or soon after a random change in its folder."""

    def __init__(self, chance: random.Random, out: Path, seconds: float) -> None:
        self.out, self.names = out, names_in(out)
        self.changes = chance.choice([0, *range(1, 30, 2)])
        self.at = chance.choice([0.0, 0.001, 0.01, 0.1])
        if chance.random() < 0.4:
            self.changes, self.at = 0, chance.uniform(0, seconds)

    def __call__(self, passed: float) -> bool:
        """Whether it has come, so many seconds after the start."""
        if self.changes:
            now = names_in(self.out)
            if now != self.names:
                self.names, self.changes = now, self.changes - 1
                # counted from the last change on
                self.at += passed if not self.changes else 0
            return False
        return passed >= self.at


def _longer() -> None:
    # importing all libraries takes most of what a try has
    resource.setrlimit(resource.RLIMIT_CPU, (60, resource.RLIM_INFINITY))


def real_command(words: list[str]) -> subprocess.Popen[bytes]:
    code = "import sys; from dualdiff_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, **ONE_THREAD}
    command = [sys.executable, "-c", code, *words]
    return subprocess.Popen(command, env=environment, preexec_fn=_longer)


# --- disks ------------------------------------------------------------------------------------


def _libc(call: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def _mount(folder: Path, flags: int, options: str) -> None:
    place = str(folder).encode()
    _libc("mount", b"tmpfs", place, b"tmpfs", ctypes.c_ulong(flags), options.encode())


def own_disk(folder: Path, options: str) -> None:
    """Mount a small disk that this process and its children alone see. Raises OSError."""
    try:
        _libc("unshare", _NEW_MOUNTS)
    except PermissionError:
        own = os.getuid(), os.getgid()
        _libc("unshare", _NEW_MOUNTS | _NEW_USER)
        Path("/proc/self/setgroups").write_text("deny")
        for name, number in zip(("uid_map", "gid_map"), own, strict=True):
            Path(f"/proc/self/{name}").write_text(f"{number} {number} 1")
    _libc("mount", None, b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    _mount(folder, 0, options)


def change_disk(folder: Path, options: str, *, read_only: bool = False) -> None:
    _mount(folder, _REMOUNT | (_READ_ONLY if read_only else 0), options)


def may_mount(folder: Path) -> bool:
    """Whether this machine lets a test have a disk of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            own_disk(folder, "size=64k")
            code = 0
        finally:
            os._exit(code)
    return ended(pid) == 0


def failing_disk(chance: random.Random, writes: int, number: int) -> Callable[[], None]:
    """os.fsync, which every file passes, fails from the n-th call on, in this process."""
    calls = [chance.randrange(writes)]
    real = os.fsync

    def fsync(file: int) -> None:
        calls[0] -= 1
        if calls[0] < 0:
            raise OSError(number, os.strerror(number))
        real(file)

    def fail() -> None:
        os.fsync = fsync

    return fail
