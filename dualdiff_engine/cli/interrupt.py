"""Ctrl-C and SIGTERM that end a long command cleanly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# exit codes, as shells give them: 128 and the signal's number
INTERRUPTED, TERMINATED = 130, 143

_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


class Stop:
    """Whether, and by what, a command was asked to stop.

    code: the exit code that says so, 0 until then.
    """

    def __init__(self) -> None:
        self.code = 0

    def is_set(self) -> bool:
        """Whether the command was asked to stop."""
        return self.code != 0


@contextmanager
def clean_stop(interrupt: Callable[[], None] = lambda: None) -> Iterator[Stop]:
    """The first Ctrl-C or SIGTERM ends the run after its step, the second at once."""
    stopped = Stop()

    def stop(number: int, _: object) -> None:
        # not what was there before: a job in the background starts with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stopped.code = _CODES[signal.Signals(number)]
        interrupt()
        # a stream cannot be entered twice, and the signal may have come while one was written
        with suppress(OSError):
            os.write(2, b"\ndualdiff: stopping after this step; once more stops at once\n")

    before = {number: signal.signal(number, stop) for number in _CODES}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
