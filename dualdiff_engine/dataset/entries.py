"""The pairs of a dataset, for what reads them: formats, galleries, users."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Entry:
    """A pair in a dataset.

    image, mask, anomaly: files; the mask has 255 on the defect, 0 elsewhere. scores: by name, those
    that are known. verdict: accepted, or the gate that rejected it; by_hand: a person did.
    """

    product: str
    defect: str
    number: int
    image: Path
    mask: Path
    anomaly: Path | None
    scores: Mapping[str, float]
    verdict: str
