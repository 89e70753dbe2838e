"""Recipe of the demo adapters: `python -m dualdiff_engine.demo.train.adapters BASE OUTPUT`.

Each learns from 8 defective pictures of the factory. Writes `OUTPUT/<part>-<defect>/` with the
adapter and its training record; a finished folder is not trained again.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dualdiff_engine.demo.factory.samples import defective_seed, make, write_dataset
from dualdiff_engine.demo.presets import PRESETS, Preset, find

PICTURES = 8
DATA_SEED = 1_000_000
# a small model takes larger and fewer steps than SD-1.5
OPTIONS: dict[str, Any] = {
    "rank": 16,
    "blend_width": 32,
    # what the base was trained on; draws of this VAE's posterior are grainy
    "latents": "mean",
    "batch": 4,
    "learning_rate": 1e-3,
    "lr_schedule": "cosine",
    "warmup": 20,
    "prompt_dropout": 0.0,
    # as the base was
    "dtype": "bfloat16",
    "save_dtype": "float16",
    "device": "cpu",
}
# with background a step takes half as long again
STEPS, BACKGROUND_STEPS = 650, 500


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("base", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    options = parser.parse_args(arguments)
    presets = [find(name) for name in options.only] or list(PRESETS.values())
    for preset in presets:
        target = options.output / preset.adapter.name
        if not target.exists():
            train(preset, options.base, target)


def train(preset: Preset, base: Path, target: Path, **changed: Any) -> None:
    """Make the data, train, and keep what the engine needs. changed: of `TrainingOptions`."""
    from dualdiff_engine.training import TrainingOptions, train_adapter

    work = target.with_name(target.name + ".work")
    data = work / "data"
    if not data.exists():
        write_dataset(
            data, preset.part, [preset.defect], good=4, defective=PICTURES, seed=DATA_SEED
        )
    steps = BACKGROUND_STEPS if preset.background else STEPS
    options = TrainingOptions(
        defect=preset.defect,
        background=preset.background,
        image_prompt=preset.prompts.image,
        anomaly_prompt=preset.prompts.anomaly,
        **{**OPTIONS, "steps": steps, **changed},
    )
    train_adapter(base, data, work / "run", options, progress=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in KEPT:
        shutil.copyfile(work / "run" / name, partial / name)
    partial.rename(target)


def training_masks(preset: Preset) -> list[np.ndarray]:
    """The masks of the pictures that a preset's adapter learnt from, uint8 [SIZE, SIZE]."""
    seeds = (defective_seed(DATA_SEED, 1, n) for n in range(PICTURES))
    return [make(preset.part, preset.defect, seed=seed).mask for seed in seeds]


KEPT = ("pytorch_lora_weights.safetensors", "training.json")


if __name__ == "__main__":
    main()
