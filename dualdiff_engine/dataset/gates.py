"""Which pairs are good: the scores of a pair, and the first gate that it does not pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualdiff_engine.dataset import job
from dualdiff_engine.dataset.inputs import Source, area_of
from dualdiff_engine.dataset.rows import ACCEPTED
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pair import Pair
from dualdiff_engine.pipeline.regions import region_statistics

# no level of a picture above: what a printer would call black
_BLACK = 8
SCORES = ("agreement", "area", "parts", "change_inside", "change_outside", "change_share")


def scores_of(pair: Pair) -> dict[str, float]:
    """Of a pair with PIL pictures, by the names in `job.Gates`; what is not known is left out."""
    mask = np.asarray(pair.mask) > 0
    found: dict[str, float | None] = {
        name: pair.scores.get(name) for name in ("change_inside", "change_outside", "change_share")
    }
    difference = pair.scores.get("branch_difference")
    found["agreement"] = None if difference is None else 1 - difference
    # of the whole picture, also where a window was drawn
    found["area"] = float(mask.mean())
    found["parts"] = _parts(pair.mask)
    return {name: value for name in SCORES if (value := found[name]) is not None}


def _parts(mask: Any) -> float:
    """Parts of a mask as they are counted in real ones; 0 where there are crumbs alone."""
    try:
        return float(region_statistics([mask]).counts[0])
    except SettingsError:
        return 0.0


@dataclass(frozen=True)
class Gate:
    """The gates of a defect. bounds: score -> (low, high), None where there is no bound."""

    chosen: job.Gates
    bounds: Mapping[str, tuple[float | None, float | None]]

    @classmethod
    def of(cls, chosen: job.Gates, source: Source) -> Gate:
        """With quantiles learnt. Raises SettingsError where there are no real masks."""
        bounds = {}
        for name in SCORES:
            given = getattr(chosen, name)
            if given != "record":
                bounds[name] = (_bound(name, given[0], source), _bound(name, given[1], source))
        return cls(chosen, bounds)

    def verdict(self, pair: Pair, scores: Mapping[str, float]) -> tuple[str, str]:
        """accepted, or the gate that rejects; and the reason."""
        image = np.asarray(pair.image)
        if self.chosen.black == "reject" and int(image.max()) <= _BLACK:
            return "black", f"no level of its image is above {_BLACK}"
        if self.chosen.empty == "reject" and pair.empty_mask:
            return "empty", "its mask is empty"
        if self.chosen.full == "reject" and pair.full_mask:
            return "full", "its mask covers the whole picture"
        for name, (low, high) in self.bounds.items():
            value = scores.get(name)
            if value is None:
                return name, f"its {name} is not known"
            if low is not None and value < low:
                return name, f"{name} {value:.4g} is below {low:.4g}"
            if high is not None and value > high:
                return name, f"{name} {value:.4g} is above {high:.4g}"
        return ACCEPTED, ""


def _bound(name: str, given: float | str | None, source: Source) -> float | None:
    if given is None or not isinstance(given, str):
        return given
    if not source.masks:
        raise SettingsError(
            f"gates.{name}: {given} needs real masks of {source.name}: add region_masks to it, or "
            "use a number"
        )
    if name == "area":
        values = [area_of(mask) for mask in source.masks]
    else:
        statistics = source.statistics
        assert statistics is not None
        values = [float(count) for count in statistics.counts]
    return float(np.quantile(values, int(given[1:]) / 100))
