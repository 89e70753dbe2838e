"""Between batches: who may draw, how many pairs fit, and a bar that never stops a run."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dualdiff_engine.device import onednn_refuses
from dualdiff_engine.errors import BackendError, OutOfMemoryError, SettingsError

logger = logging.getLogger(__name__)

# batches that went through before a larger one is tried again
PATIENCE = 8
# what one pair alone can still be made to need
SMALLER = "use a smaller size or dtype bfloat16"


class BusyLock:
    """Held while networks run: the engine's weights must not change under them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises SettingsError when somebody else holds it."""
        if not self._lock.acquire(blocking=False):
            raise SettingsError(
                "the engine is drawing: wait until the running call or its callback is done, or "
                "use an engine per thread"
            )
        try:
            yield
        finally:
            self._lock.release()


class BatchMemory:
    """The largest batch that fits, learnt from failures, forgotten after successes."""

    def __init__(self) -> None:
        self._limit: int | None = None
        self._since = 0
        self._warned = False

    def next(self, wanted: int) -> int:
        """Pairs to draw at once: as many as wanted, or as fit."""
        if self._limit is not None and self._since >= PATIENCE:
            self._limit, self._since = self._limit * 2, 0
        return wanted if self._limit is None else min(wanted, self._limit)

    def fitted(self) -> None:
        """A batch went through."""
        self._since += 1

    def failed(self, batch: int, message: str) -> int:
        """A batch did not fit; returns the next to try. message: of the error that said so.

        Raises OutOfMemoryError at one pair, BackendError where the reason was not memory.
        """
        if onednn_refuses(message):
            raise BackendError(
                "oneDNN cannot create any kernel on this machine, at any batch: allow the process "
                "to map executable memory, or install another build of PyTorch"
            )
        if batch == 1:
            raise OutOfMemoryError("at a batch of 1 pair", f"not even one pair fits; {SMALLER}")
        if self._limit is None:
            logger.warning(
                "out of memory at a batch of %d pairs: drawing the same seeds again, %d at once",
                batch,
                batch // 2,
            )
        self._limit, self._since = batch // 2, 0
        return self._limit

    def freed(self, doing: str) -> None:
        """Something else did not fit next to what earlier batches left behind."""
        if not self._warned:
            logger.warning("out of memory %s: freeing memory, then trying again", doing)
        self._warned = True


class Stderr:
    """Standard error for a progress bar: full or closed, it must not cost a pair."""

    def write(self, text: str) -> int:
        """As a file's `write`; what cannot be written is dropped."""
        with suppress(OSError, ValueError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """As a file's `flush`."""
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """Whether a person may be looking."""
        with suppress(OSError, ValueError):
            return sys.stderr.isatty()
        return False
