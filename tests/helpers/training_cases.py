"""Small training data, and runs on the tiny model of the golden cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dualdiff_engine.adapters import files
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.training import TrainingOptions
from dualdiff_engine.training.network import TrainableNetwork
from support import DATA

DEFECT = "hole"
SIZE = 64


def base_of(background: bool) -> Path:
    return DATA / ("bcm" if background else "dual") / "model"


def picture_of(root: Path, index: int) -> Path:
    return root / "test" / DEFECT / f"{index:03d}.png"


def mask_of(root: Path, index: int, folder: str = "ground_truth", defect: str = DEFECT) -> Path:
    return root / folder / defect / f"{index:03d}_mask.png"


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_data(root: Path, count: int = 3) -> Path:
    """Discs with a bright hole, their masks, objects' masks, and one good disc; SIZE² pixels."""
    down, across = np.mgrid[:SIZE, :SIZE]
    disc = ((down - 32) ** 2 + (across - 32) ** 2 < 24**2).astype(np.uint8)
    random = np.random.default_rng(0)
    for index in range(count):
        hole = np.zeros_like(disc)
        hole[20 + 3 * index : 30 + 3 * index, 24:40] = 1
        noise = random.integers(0, 20, (SIZE, SIZE, 3), dtype=np.uint8)
        save(picture_of(root, index), noise + (90 * disc + 110 * hole)[..., None])
        save(mask_of(root, index), 255 * hole)
        save(mask_of(root, index, "object_mask"), 255 * disc)
    save(root / "train" / "good" / "000.png", np.repeat(90 * disc[..., None], 3, 2))
    save(mask_of(root, 0, "object_mask", "good"), 255 * disc)
    return root


def options_of(**changes: Any) -> TrainingOptions:
    """Options of a run that takes a second."""
    small = {"rank": 4, "blend_width": 12, "size": SIZE, "batch": 2, "sample_every": 0}
    return TrainingOptions(DEFECT, **{**small, **changes})


def network_of(*, disturbed: bool = True, **changes: Any) -> TrainableNetwork:
    """disturbed: every parameter is away from zero, as if it had been trained for long."""
    options = options_of(**changes)
    dtype = getattr(torch, "float32" if options.dtype == "auto" else options.dtype)
    base = BaseModel(base_of(options.background))
    network = TrainableNetwork(base, options, torch.device("cpu"), dtype)
    if disturbed:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs_of(background: bool, batch: int = 2) -> tuple[torch.Tensor | None, ...]:
    """latents, timesteps, context, background."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, batch, 4, 8, 8, generator=generator)
    times = torch.tensor([500, 20, 980])[:batch]
    context = torch.randn(2, 1, 77, 32, generator=generator)
    surroundings = torch.randn(batch, 4, 8, 8, generator=generator) if background else None
    return latents, times, context, surroundings


def coupled_adapter(path: Path, **changes: Any) -> Path:
    """A file of an adapter with the coupling of `dh-diff`, as if it had been trained for long."""
    with torch.inference_mode(False), torch.enable_grad():
        network = network_of(**{"system": "dh-diff", **changes})
        files.write(path, network.tensors(), files.Origin(coupling=network.coupling))
    return path
