"""Records as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dualdiff_engine.evaluation.downstream import METRICS

_HEADS = {
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "image_auroc": "image AUROC",
}
_ARMS = {
    "real": "{} real",
    "generated": "{} generated",
    "both": "{} of both",
    "ceiling": "{} real (ceiling)",
}


def markdown_table(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table. rows[0]: headings, of which all but the first `texts` are of numbers."""
    lines = [rows[0], ["---"] * texts + ["---:"] * (len(rows[0]) - texts), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def downstream(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Table of downstream records by name: a row per task and arm, mean ± spread over seeds.

    The last rows are means over tasks; their spread is that of the seeds' means over tasks.
    """
    heads = ["trained on", *(_HEADS[name] for name in METRICS)]
    lines = [["", *heads]]
    for name, record in tasks.items():
        for arm, found in record["arms"].items():
            lines.append([name, _label(arm, found["pictures"]), *_cells(found)])
    if len(tasks) > 1:
        for arm, found in overall(tasks).items():
            lines.append(["**mean**", _label(arm, found["pictures"]), *_cells(found)])
    return markdown_table(lines, texts=2)


def overall(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per arm that all tasks have: `pictures`, `mean` and `spread` of the means over tasks.

    Every seed gives a mean over tasks; mean and sample standard deviation are those of these.
    """
    records = list(tasks.values())
    shared = [arm for arm in records[0]["arms"] if all(arm in r["arms"] for r in records)]
    found: dict[str, dict[str, Any]] = {}
    for arm in shared:
        by_seed = {
            name: _by_seed([r["arms"][arm]["runs"] for r in records], name) for name in METRICS
        }
        several = len(next(iter(by_seed.values()))) > 1
        counts = {record["arms"][arm]["pictures"] for record in records}
        found[arm] = {
            "pictures": counts.pop() if len(counts) == 1 else f"{min(counts)}-{max(counts)}",
            "mean": {name: float(np.mean(means)) for name, means in by_seed.items()},
            "spread": {
                name: float(np.std(means, ddof=1)) if several else None
                for name, means in by_seed.items()
            },
        }
    return found


def against_first(tasks: Mapping[str, Mapping[str, Any]], metric: str = "pixel_ap") -> str:
    """Table of one metric: a row per task, a column per arm; the last row is of means over tasks.

    Every arm but the first is also given as a share of the first.
    """
    arms = list(overall(tasks))
    rows = {name: record["arms"] for name, record in tasks.items()}
    if len(rows) > 1:
        rows["**mean**"] = overall(tasks)
    lines = [[_HEADS[metric], *arms]]
    for name, found in rows.items():
        first = found[arms[0]]["mean"][metric]
        shares = (f" ({found[arm]['mean'][metric] / first:.0%})" for arm in arms[1:])
        cells = (_mean_and_spread(found[arm], metric) for arm in arms)
        parts = zip(cells, ["", *shares], strict=True)
        lines.append([name, *(cell + share for cell, share in parts)])
    return markdown_table(lines)


def gap_closed(found: Mapping[str, Mapping[str, Any]], metric: str) -> float | None:
    """Part of the way from `real` to `ceiling` that `generated` goes; None without such a way.

    found: arms with `mean`, of a record or of `overall`. Negative where generated pairs do harm.
    """
    if not {"real", "generated", "ceiling"} <= set(found):
        return None
    real, generated, ceiling = (
        found[arm]["mean"][metric] for arm in ("real", "generated", "ceiling")
    )
    return float((generated - real) / (ceiling - real)) if ceiling > real else None


def headline(tasks: Mapping[str, Mapping[str, Any]], metric: str = "pixel_ap") -> str:
    """Whether generated pairs beat the few real pictures, on the mean over tasks, in a sentence.

    They do when they are ahead by more than the larger of both spreads over seeds.
    """
    found = overall(tasks)
    real, generated = found["real"], found["generated"]
    ahead = generated["mean"][metric] - real["mean"][metric]
    noise = max(real["spread"][metric] or 0.0, generated["spread"][metric] or 0.0)
    verdict = "ahead of" if ahead > noise else "behind" if ahead < -noise else "no different from"
    reached, before = (_mean_and_spread(arm, metric) for arm in (generated, real))
    sentence = (
        f"Trained on generated pairs, mean {_HEADS[metric]} is {reached}: {verdict} {before} on "
        f"{real['pictures']} real pictures"
    )
    if "ceiling" not in found:
        return sentence + "."
    ceiling = f"{_mean_and_spread(found['ceiling'], metric)} on as many real ones"
    closed = gap_closed(found, metric)
    # a way is gone forwards
    if closed is None or ahead <= 0:
        return sentence + f"; it is {ceiling}."
    return sentence + f", {closed:.0%} of the way to {ceiling}."


def quality(record: Mapping[str, Any]) -> str:
    """Table of a quality record: a row per measure, a column per defect."""
    found: Mapping[str, Any] = record["defects"]
    lines = [["", *found]]
    for label, path in _MEASURES:
        values = [_at(measures, path) for measures in found.values()]
        if any(value is not None for value in values):
            lines.append([label, *map(_figure, values)])
    return markdown_table(lines)


_MEASURES = (
    ("pairs", "pairs"),
    ("training pictures", "train"),
    ("difference of the branches inside the mask", "agreement.difference_inside"),
    ("the same with another pair's anomaly", "agreement.difference_chance"),
    ("leakage outside the mask", "agreement.leakage_outside"),
    ("worst leakage", "agreement.leakage_worst.value"),
    ("empty masks", "masks.empty"),
    ("area of masks, median", "masks.area.median"),
    ("of training masks", "masks.train.area.median"),
    ("area of masks, 5 %", "masks.area.p05"),
    ("area of masks, 95 %", "masks.area.p95"),
    ("parts per mask", "masks.parts"),
    ("of training masks", "masks.train.parts"),
    ("mask outside the object", "masks.off_object"),
    ("pairwise distance, images", "diversity.image"),
    ("of training pictures", "diversity.train.image"),
    ("pairwise distance, defects", "diversity.defect"),
    ("of training pictures", "diversity.train.defect"),
    ("pairwise distance, masks", "diversity.mask"),
    ("of training pictures", "diversity.train.mask"),
    ("nearest training picture / distance among those", "copies.image.ratio"),
    ("the same for defects", "copies.defect.ratio"),
    ("copied pictures", "copies.image.copies"),
    ("copied defects", "copies.defect.copies"),
    ("IS", "inception.is"),
    ("FID", "inception.fid"),
    ("KID", "inception.kid"),
    ("IC-LPIPS", "lpips.ic_lpips"),
)


def _at(record: Any, path: str) -> Any:
    for name in path.split("."):
        record = record.get(name) if isinstance(record, Mapping) else None
    return record


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    # lists are of names, whose number matters here
    value = len(value) if isinstance(value, list) else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _label(arm: str, count: int | str) -> str:
    return _ARMS.get(arm, arm + " ({})").format(count)


def _cells(found: Mapping[str, Any]) -> list[str]:
    return [_mean_and_spread(found, name) for name in METRICS]


def _mean_and_spread(found: Mapping[str, Any], metric: str) -> str:
    spread = found["spread"][metric]
    return f"{found['mean'][metric]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def _by_seed(runs: Sequence[Sequence[Mapping[str, float]]], metric: str) -> list[float]:
    """Mean over tasks for every seed that all tasks have, in order."""
    tables = [{row["seed"]: row[metric] for row in rows} for rows in runs]
    seeds = [seed for seed in tables[0] if all(seed in table for table in tables)]
    return [float(np.mean([table[seed] for table in tables])) for seed in seeds]
