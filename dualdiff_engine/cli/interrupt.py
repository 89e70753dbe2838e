"""Let Ctrl-C end a long command cleanly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event

INTERRUPTED = 130


@contextmanager
def clean_stop(interrupt: Callable[[], None] = lambda: None) -> Iterator[Event]:
    """The first Ctrl-C sets the event and ends the run after its step, the second at once."""
    stopped = Event()

    def stop(*_: object) -> None:
        # not the handler from before: a job in the background starts with SIGINT ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopped.set()
        interrupt()
        # a stream cannot be entered twice, and the signal may have come while one was written
        os.write(2, b"\ndualdiff: stopping after this step; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
