"""What makes a pair again: recorded with it, JSON-ready."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import dualdiff_engine
from dualdiff_engine.settings import Prompts, Sampling

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine

PACKAGES = ("torch", "numpy", "diffusers", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    return {
        "dualdiff-engine": dualdiff_engine.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def devices() -> dict[str, Any]:
    """What could compute here, by torch's name: JSON-ready."""
    import torch

    found: dict[str, Any] = {"cpu": {"cores": os.cpu_count(), "threads": torch.get_num_threads()}}
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        memory, capability = round(gpu.total_memory / 2**30), f"{gpu.major}.{gpu.minor}"
        found[f"cuda:{number}"] = {"name": gpu.name, "GiB": memory, "capability": capability}
    return found if len(found) > 1 else {**found, "cuda": {}}


def describe(
    engine: Engine,
    adapter: Mapping[str, Any],
    sampling: Sampling,
    prompts: Prompts,
    background: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The part of a recipe that all pairs of a run share."""
    return {
        "base": {"source": engine.base.source, "sha256": engine.base.sha256},
        "adapter": {"source": adapter["file"], "sha256": adapter["sha256"]},
        "sampling": asdict(sampling),
        "prompts": asdict(prompts),
        "background": dict(background) if background else None,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "backends": {row.op: row.backend for row in engine.ops.table},
        "versions": versions(),
    }
