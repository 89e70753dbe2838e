"""A painter for datasets that computes nothing: what is measured with it is the factory itself.

Its pictures are noise of the pair's seed. `DUALDIFF_STUB`, JSON in the environment, says what goes
wrong: keys under `crash` end the process, those under `hang` wait for ever, those under `black`
come out black, and those under `raises` raise. `batch`: pairs at once; `delay`: seconds per batch;
`side` of the pictures in pixels.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pair import Fault, Pair

VARIABLE = "DUALDIFF_STUB"
NAME = "dualdiff_engine.bench.dataset_stub:StubPainter"


class StubPainter:
    """See `dataset.painter.Painter`."""

    device = "stub"

    def __init__(self, job: Job, device: str) -> None:
        self._job = job
        self._how: dict[str, Any] = json.loads(os.environ.get(VARIABLE, "{}"))
        self.batch = self._how.get("batch", 4)
        self._stopped = threading.Event()

    def draw(
        self, tasks: Sequence[Task], beat: Callable[[], None], on_fault: Callable[[Fault], None]
    ) -> Iterator[Callable[[], Pair]]:
        """Noise, or what goes wrong."""
        for task in tasks:
            if task.key in self._how.get("crash", ()):
                os.kill(os.getpid(), signal.SIGSEGV)
            if task.key in self._how.get("hang", ()):
                time.sleep(3600)
            if task.key in self._how.get("raises", ()):
                raise SettingsError("the stub was told to raise: tell it not to")
        time.sleep(self._how.get("delay", 0.0))
        beat()
        for task in tasks:
            if self._stopped.is_set():
                return
            black = task.key in self._how.get("black", ())
            yield partial(pair_of, task.seed(self._job.seed), self._how.get("side", 16), black)

    def interrupt(self) -> None:
        """No more pairs."""
        self._stopped.set()

    def lost(self, error: Exception) -> bool:
        """There is no device to lose."""
        return False


def pair_of(seed: int, side: int, black: bool) -> Pair:
    """A pair of noise with a mask of its lower half."""
    noise = np.random.default_rng(seed)
    image = noise.integers(0, 256, (side, side, 3), np.uint8) * np.uint8(not black)
    anomaly = image.copy()
    mask = np.zeros((side, side), np.uint8)
    mask[side // 2 :] = 255
    anomaly[: side // 2] = 0
    return Pair(
        Image.fromarray(image),
        Image.fromarray(anomaly),
        Image.fromarray(mask),
        seed=seed,
        empty_mask=False,
        recipe={"seed": seed, "painter": "stub", "mask": {"area": 0.5}},
        scores={"branch_difference": 0.0, "area": 0.5},
    )
