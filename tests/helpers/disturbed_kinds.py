"""The kinds of disturbed runs that `fault_lab` tries: kills, and disks that take no more."""

from __future__ import annotations

import errno
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import disturbed_runs as runs
from dualdiff_engine.errors import OutputError
from dualdiff_engine.pictures import is_whole_png
from dualdiff_engine.training.record import draw_curve
from fault_kinds import Kind, engine_of
from training_cases import write_data


@dataclass(frozen=True)
class Undisturbed:
    """What a run that nothing disturbs leaves, and how long it takes."""

    data: Path
    files: dict[str, bytes]
    seconds: float


# by whether it trains
_UNDISTURBED: dict[bool, Undisturbed] = {}


class Run(Kind):
    """A run of the command, which is compared with an undisturbed one."""

    seconds = 300
    training = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # libraries that a child would else import again and again
        engine_of("dual")
        if self.training not in _UNDISTURBED:
            draw_curve(folder / "curve.png", torch.rand(3, 2))
            data, out = write_data(folder / "data", 2), folder / "whole"
            started = time.monotonic()
            runs.finish(self._words(data, out), folder / "errors")
            seconds = time.monotonic() - started
            _UNDISTURBED[self.training] = Undisturbed(data, runs.contents(out), seconds)
        whole = _UNDISTURBED[self.training]
        self.data, self.wanted, self.whole = whole.data, whole.files, whole.seconds
        assert len(self.wanted) >= 6

    def _words(self, data: Path, out: Path) -> list[str]:
        return runs.train_words(data, out) if self.training else runs.generate_words(out)

    def words(self, out: Path) -> list[str]:
        return self._words(self.data, out)

    def damage(self, seed: int, folder: Path) -> str:
        return "run"

    def compare(self, out: Path) -> None:
        wrong = runs.differences(runs.contents(out), self.wanted)
        assert not wrong, f"differs from an undisturbed run: {', '.join(wrong[:5])}"


class Kills(Run):
    """kill -9 at a random moment, of some the continued run too, then to the end."""

    def use(self, seed: int, folder: Path) -> str:
        chance, out, times = random.Random(seed), folder / "out", list[str]()
        wanted = chance.choice([1, 1, 2])
        while len(times) < wanted:
            pid = runs.start(self.words(out), folder / "errors")
            killed = runs.kill_in_time(pid, runs.Moment(chance, out, 0.9 * self.whole))
            if killed is None:
                # it was faster: from the start again
                shutil.rmtree(out)
                times.clear()
            else:
                times.append(f"{killed:.2f} s")
        runs.finish(self.words(out), folder / "errors")
        self.compare(out)
        return f"after {' and '.join(times)}"


class TrainingKills(Kills):
    training = True


class Commands(Run):
    """kill -9 of the command as a user starts it."""

    def use(self, seed: int, folder: Path) -> str:
        chance, out = random.Random(seed), folder / "out"
        process = runs.real_command(self.words(out))
        names = chance.randint(1, 12)
        while process.poll() is None and runs.names_in(out) < names:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        again = runs.real_command(self.words(out))
        code = again.wait()
        assert code == runs.DONE, f"exit code {code}"
        self.compare(out)
        return f"at {names} names"


class TrainingCommands(Commands):
    training = True


class Disks(Run):
    """A run on a disk that refuses to take more, and its continuation on one that takes it.

    The first has to end in one line; a pair or file that was whole before stays.
    """

    def refused(self, words: list[str], errors: Path, before: Any = lambda: None) -> str:
        """The one line; empty if the run came to its end."""
        code = runs.ended(runs.start(words, errors, before))
        said = errors.read_text().splitlines()
        if code == runs.DONE:
            return ""
        assert code == runs.FAILED, f"exit code {code}: {said[-3:]}"
        assert len(said) == 1, f"{len(said)} lines: {said[:3]}"
        assert said[0].startswith("dualdiff: ")
        return said[0]

    def check(self, out: Path) -> None:
        """What lies there under its own name is whole."""
        for path in out.rglob("*.png"):
            assert is_whole_png(path), f"{path} is torn"
        for path in out.rglob("*.safetensors"):
            load_file(path)

    def end(self, said: str, folder: Path, out: Path) -> str:
        runs.finish(self.words(out), folder / "errors")
        self.compare(out)
        if said:
            raise OutputError(said)
        return "the disk was large enough"


class FullDisks(Disks):
    """The disk is full (a small one is mounted where that is allowed)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        place = folder / "disk"
        place.mkdir()
        self.mounts = runs.may_mount(place)
        self.pages = sum(-(-len(content) // 4096) for content in self.wanted.values())

    def use(self, seed: int, folder: Path) -> str:
        chance, disk = random.Random(seed), folder / "disk"
        disk.mkdir()
        out = disk / "out"
        if not self.mounts:
            fails = runs.failing_disk(chance, 8, errno.ENOSPC)
            said = self.refused(self.words(out), folder / "errors", fails)
            return self.end(said, folder, out)
        # the state of a training run is written beside the one before
        pages = chance.randint(1, 2 * self.pages)
        limit = f"size={4 * pages}k" if seed % 3 else f"nr_inodes={chance.randint(2, 16)}"
        runs.own_disk(disk, limit)
        said = self.refused(self.words(out), folder / "errors")
        self.check(out)
        runs.change_disk(disk, "size=64m,nr_inodes=1000")
        return self.end(said, folder, out)


class TrainingFullDisks(FullDisks):
    training = True


class Quotas(Disks):
    """The user's quota is used up: EDQUOT, from a random file on."""

    def use(self, seed: int, folder: Path) -> str:
        fails = runs.failing_disk(random.Random(seed), 8, errno.EDQUOT)
        out = folder / "out"
        said = self.refused(self.words(out), folder / "errors", fails)
        self.check(out)
        return self.end(said, folder, out)


class TrainingQuotas(Quotas):
    training = True


class ReadOnly(Disks):
    """The disk becomes read-only after some pairs were written."""

    def use(self, seed: int, folder: Path) -> str:
        disk = folder / "disk"
        disk.mkdir()
        out = disk / "out"
        runs.own_disk(disk, "size=64m")
        if seed % 2:
            first = runs.generate_words(out)
            first[first.index("--seeds") + 1] = "3:5"
            runs.finish(first, folder / "errors")
        runs.change_disk(disk, "size=64m", read_only=True)
        said = self.refused(self.words(out), folder / "errors")
        assert said, "a run on a read-only disk came to its end"
        runs.change_disk(disk, "size=64m")
        return self.end(said, folder, out)


KINDS: dict[str, type[Kind]] = {
    "kill generate": Kills,
    "kill train": TrainingKills,
    "kill command generate": Commands,
    "kill command train": TrainingCommands,
    "full disk generate": FullDisks,
    "full disk train": TrainingFullDisks,
    "quota generate": Quotas,
    "quota train": TrainingQuotas,
    "read-only": ReadOnly,
}
