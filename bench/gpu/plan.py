"""Which parts of the GPU suite run, and for how long at most: decided before anything starts.

The limits of all parts together are what one command may take, so each is what the part needs: a
kernel takes 0.7 s of a core to compile, a process 12 s until it compiles its first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

TOTAL_S = 9 * 60
KERNEL_S, START_S = 0.7, 12.0
# to stop in good order before it is killed
GRACE_S = 5


@dataclass(frozen=True)
class Part:
    """call: of the three, in which it runs, 0 if only when it is named. least, most: seconds it
    needs to be of use, and may take."""

    name: str
    call: int
    least: int
    most: int


PARTS = {
    part.name: part
    for part in (
        Part("machine", 1, 12, 25),
        Part("compile", 1, 25, 70),
        Part("checks", 1, 20, 50),
        Part("convolutions", 1, 15, 30),
        Part("ops", 1, 20, 70),
        Part("autotune", 2, 40, 80),
        Part("steps", 2, 25, 60),
        Part("peers", 3, 25, 45),
        Part("end_to_end", 3, 25, 50),
        Part("ladder", 3, 20, 30),
        Part("footprint", 3, 20, 30),
        Part("compiled", 0, 120, 300),
    )
}
CALLS = (1, 2, 3)


def of_call(call: int | None) -> list[str]:
    """The parts of a call; of all three without one. A later call compiles what it needs itself."""
    if call is None:
        return [name for name, part in PARTS.items() if part.call]
    own = [name for name, part in PARTS.items() if part.call == call]
    return own if call == 1 else ["machine", "compile", *own]


def plan(names: Iterable[str], seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """(part -> its seconds, part -> why it is left out), first come first served."""
    given: dict[str, float] = {}
    dropped: dict[str, str] = {}
    for name in names:
        part = PARTS[name]
        if seconds < part.least:
            dropped[name] = f"skipped: {seconds:.0f} s left, it needs {part.least} s"
        else:
            given[name] = min(part.most, seconds)
            seconds -= given[name]
    return given, dropped


def compile_s(kernels: int, cores: int) -> float:
    """Seconds to compile that many in processes of their own, one per core."""
    return START_S + KERNEL_S * math.ceil(kernels / cores) if kernels else 0.0


def affordable(kernels: Sequence[int], timed_s: Sequence[float], seconds: float, cores: int) -> int:
    """How many classes, the first ones, can be compiled and timed.

    kernels: to compile for each; timed_s: to time each afterwards.
    """
    for count in range(len(kernels), 0, -1):
        if compile_s(sum(kernels[:count]), cores) + sum(timed_s[:count]) <= seconds:
            return count
    return 0
