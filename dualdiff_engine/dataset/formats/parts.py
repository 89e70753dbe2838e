"""Connected parts of a mask: what detectors of objects take for one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """flags: bool [H, W], true on the part. box: left, top, width, height; area: in pixels."""

    flags: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    area: int


def parts_of(flags: NDArray[np.bool_]) -> Iterator[Part]:
    """The parts of a mask, bool [H, W]; pixels that touch by a corner belong together."""
    levels = flags.astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(levels, connectivity=8)
    for number in range(1, count):
        left, top, width, height, area = (int(value) for value in stats[number])
        yield Part(np.asarray(labels == number), (left, top, width, height), area)
