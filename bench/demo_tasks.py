"""A record with one downstream task per demo adapter, added to task by task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.demo.presets import BASE, PRESETS, Preset
from dualdiff_engine.evaluation import records, report
from dualdiff_engine.evaluation.downstream import DownstreamOptions, Task, run
from dualdiff_engine.pair import versions


def read(file: Path) -> dict[str, Any]:
    """The tasks of a record by the name of their preset; none if there is no such file."""
    return json.loads(file.read_text("utf-8"))["tasks"] if file.is_file() else {}


def base() -> dict[str, str]:
    """For `source`: which base model drew, whose decoder may change under the same adapters."""
    return {"base": BaseModel(BASE).sha256[:8]}


def add(
    file: Path,
    preset: Preset,
    source: Mapping[str, Any],
    options: DownstreamOptions,
    task: Callable[[], Task],
    summary: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda arms: {},
) -> None:
    """Run a preset's task and write it to the record, unless it stands there already.

    source: JSON-ready, all that tells this task from another one of the same preset and options.
    task: called only when it has to run. summary: more for `overall`, from the arms over all tasks.
    """
    before = read(file)
    known = before.get(preset.name, {})
    if known.get("source") == source and known.get("options") == options.listed():
        return
    result = run(task(), options, lambda line: print(f"{preset.name}: {line}", flush=True))
    added = {**before, preset.name: {"source": source, **result}}
    tasks = {name: added[name] for name in PRESETS if name in added}
    arms = report.overall(tasks)
    overall = {"arms": arms, **summary(arms)}
    records.write(file, {"versions": versions(), "overall": overall, "tasks": tasks})
