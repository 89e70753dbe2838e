"""Work that goes on beside the device: masks, compression and files of pairs that are drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Beside:
    """Makes calls in one thread, in the order in which they come; use as a context manager.

    room: most calls that wait; `submit` blocks when they do. The first exception of a call ends
    it: `failed` is called, later calls are not made, and the next `submit`, or leaving without
    another exception, raises it.
    """

    def __init__(self, room: int, failed: Callable[[], object] = lambda: None) -> None:
        self._room = threading.BoundedSemaphore(room)
        self._failed = failed
        self._pool = ThreadPoolExecutor(1, "beside")
        self._failure: BaseException | None = None

    def submit(self, call: Callable[..., object], *arguments: Any) -> None:
        """Have a call made. Raises what an earlier one raised."""
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        self._pool.submit(self._make, call, arguments)

    def _make(self, call: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        try:
            if self._failure is None:
                call(*arguments)
        except BaseException as error:
            self._failure = error
            self._failed()
        finally:
            self._room.release()

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Wait for the calls that were handed over; after a Ctrl-C for the one that is made."""
        at_once = kind is not None and not issubclass(kind, Exception)
        self._pool.shutdown(cancel_futures=at_once)
        if kind is None and self._failure is not None:
            raise self._failure
