"""Guidance that an adapter holds: what `dualdiff train --distill-guidance` writes into its file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualdiff_engine.settings import MOST_GUIDANCE


@dataclass(frozen=True)
class Distilled:
    """How guidance came into an adapter, whose conditional prediction is the guided one.

    guidance: the teacher's scale. teacher: sha256 of its file. steps: optimizer steps.
    """

    guidance: float
    teacher: str
    steps: int

    @classmethod
    def of(cls, value: object) -> Distilled:
        """From parsed JSON, which may come from others. Raises ValueError for anything else."""
        if not isinstance(value, Mapping):
            raise ValueError("not an object")
        guidance: Any = value.get("guidance")
        teacher, steps = value.get("teacher"), value.get("steps")
        # `True` is a number in Python, but not meant as one
        if type(guidance) not in (int, float) or not 1 < guidance <= MOST_GUIDANCE:
            raise ValueError(f"guidance is {str(guidance)[:40]!r}")
        if not isinstance(teacher, str) or not re.fullmatch(r"[0-9a-f]{64}", teacher):
            raise ValueError(f"teacher is {str(teacher)[:80]!r}")
        if type(steps) is not int or not 1 <= steps <= 10_000_000:
            raise ValueError(f"steps is {str(steps)[:40]!r}")
        return cls(float(guidance), teacher, steps)

    def __str__(self) -> str:
        return f"guidance {self.guidance:g}, of {self.teacher[:12]}… in {self.steps} steps"
