"""What is written next to the adapter: how it was trained, its losses, and a contact sheet."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dualdiff_engine import adapters
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.files import write_whole
from dualdiff_engine.pair import Fault, versions
from dualdiff_engine.settings import BRANCHES, Background
from dualdiff_engine.training.options import TrainingOptions

logger = logging.getLogger(__name__)

RECORD, CURVE, SHEET = "training.json", "loss.png", "sheet.png"
# of the loss curve in the record
_POINTS = 100


def write(
    output: Path, adapter: Path, base: BaseModel, made: dict[str, Any], losses: Tensor
) -> None:
    """Write `training.json`: everything needed to reproduce the adapter. Raises OutputError.

    made: options, data and where it ran, JSON-ready. losses [steps, 2 branches]: recorded as means
    of equal parts of the run.
    """
    loaded = adapters.load(adapter)
    every = max(1, len(losses) // _POINTS)
    means = losses[: len(losses) // every * every].unflatten(0, (-1, every)).mean(1)
    content: dict[str, Any] = {
        "adapter": {
            "file": adapter.name,
            "sha256": loaded.sha256,
            "parameters": loaded.parameters,
            "sites": len(loaded.sites),
        },
        "base": {"source": Path(base.source).name, "sha256": base.sha256},
        **made,
        "steps_done": len(losses),
        "loss": {
            "mean_of_steps": every,
            **{b: [round(v, 5) for v in means[:, n].tolist()] for n, b in enumerate(BRANCHES)},
        },
        "versions": versions(),
    }
    # a line for every entry; curves and listings would fill pages with an indent
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in content.items())
    write_whole(output / RECORD, ("{\n" + ",\n".join(lines) + "\n}\n").encode())


def draw_curve(path: Path, losses: Tensor) -> bool:
    """Losses [steps, 2 branches], each step and its running mean; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    # the timestep drawn decides most of a step's loss: only a mean over many tells anything
    window = max(1, min(len(losses) // 10, 200))
    steps = np.arange(1, len(losses) + 1)
    for index, branch in enumerate(BRANCHES):
        values = losses[:, index].double().numpy()
        sums = np.cumsum(np.concatenate([[0.0], values]))
        (line,) = axes.plot(steps[window - 1 :], (sums[window:] - sums[:-window]) / window)
        line.set_label(f"{branch}, mean of {window} steps")
        axes.plot(steps, values, color=line.get_color(), alpha=0.15, linewidth=0.5)
    axes.set_xlabel("step")
    axes.set_ylabel("noise-prediction error")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_whole(path, buffer.getvalue())
    return True


def draw_sheet(
    path: Path,
    base: str,
    adapter: Path,
    options: TrainingOptions,
    size: int,
    place: tuple[str, str],
    backgrounds: Sequence[Background],
) -> None:
    """Pairs of the engine with an adapter: image, anomaly picture, mask, a column per seed.

    size: pixels of a side. place: device and dtype. backgrounds: taken in turn, empty for none. The
    column of a pair that cannot be used stays white: a sheet is to look at, the run goes on.
    """
    from dualdiff_engine.engine import Engine
    from dualdiff_engine.pictures import grid, overlay

    columns = []
    faults: list[Fault] = []
    with Engine.from_pretrained(
        base, adapter=adapter, device=place[0], dtype=place[1], max_batch=1
    ) as engine:
        for seed in range(options.samples):
            surroundings = backgrounds[seed % len(backgrounds)] if backgrounds else None
            pairs = engine.generate(
                [seed],
                steps=options.sample_steps,
                size=size,
                prompts=(options.image_prompt, options.anomaly_prompt),
                background=surroundings,
                on_fault=faults.append,
            )
            columns += [[p.image, p.anomaly, overlay(p.image, p.mask)] for p in pairs] or [
                [Image.new("RGB", (size, size), "white")] * 3
            ]
    for fault in faults:
        logger.warning("%s: no pair of seed %d: %s", path, fault.seed, fault.reason)
    buffer = io.BytesIO()
    grid(columns).save(buffer, "PNG")
    write_whole(path, buffer.getvalue())
