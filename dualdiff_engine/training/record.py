"""What is written beside the adapter: how it was made, its losses, and pairs drawn with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from dualdiff_engine import adapters, recipe
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import OutputError
from dualdiff_engine.training.options import TrainingOptions

RECORD = "training.json"


def write(
    output: Path,
    base: BaseModel,
    options: TrainingOptions,
    files: list[dict[str, str]],
    losses: Tensor,
    adapter: Path,
) -> None:
    """`training.json`: everything that makes the adapter again. Raises OutputError."""
    loaded = adapters.load(adapter)
    content: dict[str, Any] = {
        "adapter": {
            "file": adapter.name,
            "sha256": loaded.sha256,
            "parameters": loaded.parameters,
            "sites": len(loaded.sites),
        },
        "base": {"source": Path(base.source).name, "sha256": base.sha256},
        "options": asdict(options),
        "data": files,
        "loss": {
            "image": [round(value, 6) for value in losses[:, 0].tolist()],
            "anomaly": [round(value, 6) for value in losses[:, 1].tolist()],
        },
        "versions": recipe.versions(),
    }
    replace_text(output / RECORD, json.dumps(content, indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, "utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror}): free some space") from error
