"""What an operator reads while an export runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dualdiff_engine.files import in_words

Say = Callable[[str], None]


@contextmanager
def part(say: Say, what: str, *files: Path) -> Iterator[list[Path]]:
    """Say what begins, and after the block the seconds that it took and what its files hold.

    files: those that it writes; the block may append more to the list that it gets.
    """
    say(what)
    began, written = time.perf_counter(), list(files)
    yield written
    size = f", {in_words(sum(file.stat().st_size for file in written))}" if written else ""
    say(f"{what}: {time.perf_counter() - began:.1f} s{size}")
