"""TensorRT and TensorRT-RTX behind one interface: what both share since 10.13."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from dualdiff_engine.errors import BackendError

# flavour -> (module, what to install)
FLAVOURS = {
    "tensorrt": ("tensorrt", "pip install 'dualdiff-engine[tensorrt]'"),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'dualdiff-engine[tensorrt-rtx]'"),
}
OLDEST = (10, 13)
# levels of phases whose beginning is reported, and seconds between reports within a phase
REPORTED_LEVELS, REPORT_SECONDS = 2, 10.0


def package(flavour: str) -> Any:
    """The module. Raises BackendError that names what to install."""
    if flavour not in FLAVOURS:
        raise BackendError(f"no TensorRT flavour {flavour!r}: choose one of {', '.join(FLAVOURS)}")
    module, remedy = FLAVOURS[flavour]
    try:
        trt = importlib.import_module(module)
    except ImportError as error:
        raise BackendError(f"{flavour} is not installed: {remedy}") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    # RTX counts its own releases, the first of which came after 10.13
    if flavour == "tensorrt" and version < OLDEST:
        raise BackendError(
            f"tensorrt {trt.__version__} is older than {OLDEST[0]}.{OLDEST[1]}: {remedy}"
        )
    return trt


def installed() -> str:
    """The installed flavour, TensorRT before RTX. Raises BackendError when there is none."""
    for flavour in FLAVOURS:
        try:
            package(flavour)
        except BackendError:
            continue
        return flavour
    remedies = " or ".join(remedy for _, remedy in FLAVOURS.values())
    raise BackendError(f"TensorRT is not installed: {remedies}")


def logger(trt: Any) -> Any:
    """Collects TensorRT's error messages for our own errors."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)

    return Collector()


def progress(trt: Any, say: Callable[[str], None]) -> Any:
    """Reports the builder's progress; keep it for as long as it builds.

    Each outer phase is reported when it begins, and in long phases the step number from time to
    time. TensorRT calls it from several threads.
    """

    class Reporter(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            # (level, steps) of the phases that are running
            self._phases: dict[str | None, tuple[int, int]] = {None: (0, 0)}
            self._reported = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            level = self._phases.get(parent_phase, (REPORTED_LEVELS, 0))[0] + 1
            self._phases[phase_name] = level, num_steps
            if level <= REPORTED_LEVELS:
                self._report(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._reported >= REPORT_SECONDS:
                steps = self._phases.get(phase_name, (0, 0))[1]
                self._report(f"{phase_name}: {step + 1} of {steps}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _report(self, line: str) -> None:
            self._reported = time.monotonic()
            say(line)

    return Reporter()
