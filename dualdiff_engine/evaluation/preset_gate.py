"""Whether a preset draws as well as the released sampler: three gates.

distance: it is no further from the converged solution than the released sampler is, and its masks
overlap with the converged ones. quality: the measures of `quality` are no worse than the released
sampler's, up to the error that they have over this many pairs. downstream: a network that learns
from its pairs finds defects no worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dualdiff_engine.adapters.verdicts import FAILED, NOT_MEASURED, PASSED
from dualdiff_engine.evaluation import quality
from dualdiff_engine.evaluation.data import Sample
from dualdiff_engine.evaluation.preset_pairs import CONVERGED, Drawn
from dualdiff_engine.evaluation.report import markdown_table
from dualdiff_engine.settings import RELEASED

GATES = ("distance", "quality", "downstream")
# of a mask with the converged one: intersection over union
LEAST_MEDIAN_OVERLAP, POOR_OVERLAP, MOST_POOR = 0.97, 0.8, 0.07
MOST_LEAKAGE = 1.5
# standard errors around a value that hold 95 % of others
BAND = 1.96


@dataclass(frozen=True)
class Check:
    """value must lie from low to high; None where there is no such bound."""

    gate: str
    name: str
    value: float | None
    low: float | None
    high: float | None

    @property
    def passed(self) -> bool | None:
        """None where there is nothing to compare."""
        if self.value is None or (self.low is None and self.high is None):
            return None
        # a band of rounding: values that are equal by construction are no failure
        slack = 1e-9 * abs(self.value)
        below = self.low is not None and self.value < self.low - slack
        return not below and (self.high is None or self.value <= self.high + slack)


def nearness(drawn: Drawn, converged: Drawn) -> dict[str, float]:
    """Distance of the latents to the converged ones, and overlap of the masks with theirs.

    distance: mean over pairs of the rms of the difference over the rms of the converged latents.
    overlap: intersection over union, 1 where both masks are empty; its median, smallest value and
    the share of pairs below 0.8.
    """
    axes = (1, 2, 3, 4)
    reference = converged.latents.astype(np.float64)
    off = np.sqrt(((drawn.latents - reference) ** 2).mean(axes) / (reference**2).mean(axes))
    overlap = np.array(
        [_overlap(a, b) for a, b in zip(drawn.samples, converged.samples, strict=True)]
    )
    return {
        "distance": float(off.mean()),
        "distance_worst": float(off.max()),
        "overlap_median": float(np.median(overlap)),
        "overlap_smallest": float(overlap.min()),
        "overlap_poor": float((overlap < POOR_OVERLAP).mean()),
    }


def measured(samples: Sequence[Sample]) -> dict[str, dict[str, float | None]]:
    """Value and standard error over pairs of the measures that the gate compares.

    The error is the jackknife's: of a mean it is the usual one, and it also serves the pairwise
    distances, where a bootstrap would compare pictures with themselves.
    """
    agreements = [quality.agreement([sample]) or {} for sample in samples]
    masks = [quality.masks([sample]) for sample in samples]
    drawn = quality.Reduced(samples)
    without = [quality.diversity(drawn.without(n)) for n in range(len(samples))]
    whole = quality.diversity(drawn)
    return {
        "difference_inside": _mean(row.get("difference_inside") for row in agreements),
        "leakage_outside": _mean(row.get("leakage_outside") for row in agreements),
        "area": _mean(row["area"]["mean"] for row in masks),
        "parts": _mean(row["parts"] for row in masks),
        **{
            f"diversity_{name}": {
                "value": value,
                "error": _jackknife([row[name] for row in without]),
            }
            for name, value in whole.items()
        },
    }


def checks(preset: Mapping[str, Any], released: Mapping[str, Any]) -> list[Check]:
    """The comparisons of the gates `distance` and `quality`, each of them as from `compare`."""
    near, before = preset["nearness"], released["nearness"]
    found = [
        Check("distance", "latent distance to converged", near["distance"], None,
              before["distance"]),
        Check("distance", "overlap of masks, median", near["overlap_median"],
              LEAST_MEDIAN_OVERLAP, None),
        Check("distance", f"masks that overlap less than {POOR_OVERLAP}", near["overlap_poor"],
              None, MOST_POOR),
        Check("quality", "new empty masks", preset["new_empty"], None, 0),
    ]  # fmt: skip
    for name, own in preset["measures"].items():
        value, error = (released["measures"][name][part] for part in ("value", "error"))
        low = high = None
        if value is not None and name == "leakage_outside":
            high = MOST_LEAKAGE * value
        elif value is not None and error is not None:
            low, high = value - BAND * error, value + BAND * error
        # closer agreement and more diversity are no fault
        low = None if name == "difference_inside" else low
        high = None if name.startswith("diversity") else high
        found.append(Check("quality", name.replace("_", " "), own["value"], low, high))
    return found


def downstream_check(record: Mapping[str, Any], preset: str) -> Check:
    """No less pixel AP than the released sampler's, up to a deviation over its seeds.

    record: as from `downstream.run`, with an arm per sampling.
    """
    arms, metric = record["arms"], "pixel_ap"
    spread = arms[RELEASED]["spread"][metric] or 0.0
    low = arms[RELEASED]["mean"][metric] - spread
    return Check("downstream", "pixel AP", arms[preset]["mean"][metric], low, None)


def verdict(found: Sequence[Check]) -> dict[str, Any]:
    """`gate`, `gates` (True, False, or None where nothing was measured) and `checks`."""
    gates: dict[str, bool | None] = {}
    for gate in GATES:
        results = [check.passed for check in found if check.gate == gate]
        known = [result for result in results if result is not None]
        gates[gate] = all(known) if known else None
    return {
        "gate": FAILED if False in gates.values() else PASSED,
        "gates": gates,
        "checks": [{**asdict(check), "passed": check.passed} for check in found],
    }


def new_empty(drawn: Drawn, released: Drawn) -> int:
    """Pairs whose masks are empty in the first and not in the second."""
    pairs = zip(drawn.samples, released.samples, strict=True)
    return sum(bool(b.flags().any() and not a.flags().any()) for a, b in pairs)


def compare(drawn: Mapping[str, Drawn], presets: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`nearness` and `measured` of every sampling, and `new_empty` masks of the presets, by name.

    drawn: pairs of the same seeds by name, with `converged` and `released` among them.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, pairs in drawn.items():
        found[name] = {"measures": measured(pairs.samples)}
        if name != CONVERGED:
            found[name]["nearness"] = nearness(pairs, drawn[CONVERGED])
        if name in presets:
            found[name]["new_empty"] = new_empty(pairs, drawn[RELEASED])
    return found


def table(found: Mapping[str, Any]) -> str:
    """A verdict as Markdown, a row per check."""
    rows = [["gate", "check", "value", "from", "to", ""]]
    for check in found["checks"]:
        bounds = [_figure(check[name]) for name in ("value", "low", "high")]
        word = {True: PASSED, False: FAILED, None: NOT_MEASURED}[check["passed"]]
        rows.append([check["gate"], check["name"], *bounds, word])
    return markdown_table(rows, texts=2)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _overlap(a: Sample, b: Sample) -> float:
    ours, theirs = a.flags(), b.flags()
    union = int((ours | theirs).sum())
    return float((ours & theirs).sum()) / union if union else 1.0


def _mean(values: Iterable[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"value": None, "error": None}
    error = float(np.std(known, ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else None
    return {"value": float(np.mean(known)), "error": error}


def _jackknife(without: Sequence[float | None]) -> float | None:
    """Standard error of a statistic from its values without each of the samples."""
    known = np.array([value for value in without if value is not None], np.float64)
    if len(known) < len(without) or len(known) < 2:
        return None
    return float(math.sqrt((len(known) - 1) * np.var(known)))
