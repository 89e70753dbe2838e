"""Few-shot training: pictures of a defect and their masks -> an adapter that the engine runs.

`train_adapter(base, data, output, TrainingOptions(defect=...))`. Nothing heavy is imported before a
name is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "TrainingOptions": "dualdiff_engine.training.options",
    "TrainingResult": "dualdiff_engine.training.trainer",
    "train_adapter": "dualdiff_engine.training.trainer",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from dualdiff_engine.training.options import TrainingOptions as TrainingOptions
    from dualdiff_engine.training.trainer import TrainingResult as TrainingResult
    from dualdiff_engine.training.trainer import train_adapter as train_adapter


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
