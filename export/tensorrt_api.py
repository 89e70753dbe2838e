"""TensorRT and TensorRT-RTX behind one door: what both share since 10.13."""

from __future__ import annotations

import importlib
from typing import Any

from dualdiff_engine.errors import BackendError

# flavour -> (module, what to install)
FLAVOURS = {
    "tensorrt": ("tensorrt", "pip install 'dualdiff-engine[tensorrt]'"),
    "tensorrt-rtx": ("tensorrt_rtx", "pip install 'dualdiff-engine[tensorrt-rtx]'"),
}
OLDEST = (10, 13)


def package(flavour: str) -> Any:
    """The module. Raises BackendError that names what to install."""
    if flavour not in FLAVOURS:
        raise BackendError(f"no TensorRT called {flavour!r}: choose from {', '.join(FLAVOURS)}")
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
    """The flavour at hand, TensorRT before RTX. Raises BackendError when there is none."""
    for flavour in FLAVOURS:
        try:
            package(flavour)
        except BackendError:
            continue
        return flavour
    remedies = " or ".join(remedy for _, remedy in FLAVOURS.values())
    raise BackendError(f"TensorRT is not installed: {remedies}")


def logger(trt: Any) -> Any:
    """Collects what TensorRT says, for the errors made of it."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(text)

    return Collector()
