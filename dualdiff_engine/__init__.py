"""dualdiff-engine: exact and fast inference for DualAnoDiff.

The public names are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Engine": "dualdiff_engine.engine",
    "Pair": "dualdiff_engine.pair",
    "Background": "dualdiff_engine.settings",
    "Placement": "dualdiff_engine.settings",
    "Prompts": "dualdiff_engine.settings",
    "RegionStatistics": "dualdiff_engine.pipeline.regions",
    "Sampling": "dualdiff_engine.settings",
    "AdapterError": "dualdiff_engine.errors",
    "BackendError": "dualdiff_engine.errors",
    "BaseModelError": "dualdiff_engine.errors",
    "DataError": "dualdiff_engine.errors",
    "DualDiffError": "dualdiff_engine.errors",
    "OutOfMemoryError": "dualdiff_engine.errors",
    "OutputError": "dualdiff_engine.errors",
    "PairError": "dualdiff_engine.errors",
    "SegmenterError": "dualdiff_engine.errors",
    "SettingsError": "dualdiff_engine.errors",
    "TrainingError": "dualdiff_engine.errors",
    "find_object": "dualdiff_engine.pipeline.regions",
    "region_statistics": "dualdiff_engine.pipeline.regions",
    "sample_region": "dualdiff_engine.pipeline.regions",
}
__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine as Engine
    from dualdiff_engine.errors import AdapterError as AdapterError
    from dualdiff_engine.errors import BackendError as BackendError
    from dualdiff_engine.errors import BaseModelError as BaseModelError
    from dualdiff_engine.errors import DataError as DataError
    from dualdiff_engine.errors import DualDiffError as DualDiffError
    from dualdiff_engine.errors import OutOfMemoryError as OutOfMemoryError
    from dualdiff_engine.errors import OutputError as OutputError
    from dualdiff_engine.errors import PairError as PairError
    from dualdiff_engine.errors import SegmenterError as SegmenterError
    from dualdiff_engine.errors import SettingsError as SettingsError
    from dualdiff_engine.errors import TrainingError as TrainingError
    from dualdiff_engine.pair import Pair as Pair
    from dualdiff_engine.pipeline.regions import RegionStatistics as RegionStatistics
    from dualdiff_engine.pipeline.regions import find_object as find_object
    from dualdiff_engine.pipeline.regions import region_statistics as region_statistics
    from dualdiff_engine.pipeline.regions import sample_region as sample_region
    from dualdiff_engine.settings import Background as Background
    from dualdiff_engine.settings import Placement as Placement
    from dualdiff_engine.settings import Prompts as Prompts
    from dualdiff_engine.settings import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
