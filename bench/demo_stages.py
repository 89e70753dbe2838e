"""Where pairs lose their worth: `python -m dualdiff_engine.bench.demo_stages --out FOLDER`.

For every demo adapter the downstream test with four versions of the same real pictures: untouched,
through the autoencoder and back, re-noised to half the schedule and drawn from there, and drawn
from noise alone. What one version loses against the one before is lost by one stage: by the
autoencoder, by the denoiser's last half, by its first half. Writes `stages.json`; interrupted, it
goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualdiff_engine import adapters
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.bench import demo_quality, demo_tasks
from dualdiff_engine.demo.factory import make
from dualdiff_engine.demo.factory.samples import Product
from dualdiff_engine.demo.presets import BASE, PRESETS, SAMPLING, Preset, find
from dualdiff_engine.engine import Engine
from dualdiff_engine.evaluation import records, report
from dualdiff_engine.evaluation.data import reduced, reduced_mask
from dualdiff_engine.evaluation.downstream import DownstreamOptions, Material, Task
from dualdiff_engine.evaluation.tasks import CEILING_SEED, material_task
from dualdiff_engine.pair import Pair, to_uint8
from dualdiff_engine.pipeline.decode import decoded
from dualdiff_engine.pipeline.encode import posterior_mean

FILE = "stages.json"
COUNT = 60
BATCH = 12
UNTOUCHED, ROUND_TRIP, HALF, FREE = "untouched", "round trip", "re-noised to half", "free"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--count", type=int, default=COUNT, help="pictures per arm")
    parser.add_argument("--steps", type=int, default=demo_quality.STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(DownstreamOptions().seeds))
    given = parser.parse_args(arguments)
    if given.count < 2:
        parser.error("--count must be at least 2")
    options = DownstreamOptions(steps=given.steps, seeds=tuple(given.seeds), size=demo_quality.SIZE)
    file = given.out / FILE
    records.check_writable(file)
    for preset in [find(name) for name in given.only] or list(PRESETS.values()):
        measure(file, preset, given.arms, given.count, options)
    print(report.downstream(demo_tasks.read(file)))


def measure(
    file: Path, preset: Preset, arms: Sequence[str], count: int, options: DownstreamOptions
) -> None:
    """Add a preset's task to the record, unless it stands there."""
    source = {
        **demo_tasks.base(),
        "adapter": adapters.load(preset.adapter).sha256[:8],
        "pictures": count,
        "arms": list(arms),
    }

    def task() -> Task:
        products = [make(preset.part, preset.defect, seed=CEILING_SEED + n) for n in range(count)]
        made = {name: ARMS[name](preset, products, options.size) for name in arms}
        return material_task(made, preset.part, preset.defect, options.size)

    demo_tasks.add(file, preset, source, options, task)


def untouched(preset: Preset, products: Sequence[Product], size: int) -> Material:
    return _material([p.image for p in products], [p.mask for p in products], size)


@torch.inference_mode()
def round_trip(preset: Preset, products: Sequence[Product], size: int) -> Material:
    """The pictures as the VAE gives them back, with their own masks."""
    vae = BaseModel(BASE).load_vae(torch.device("cpu"), torch.float32)
    pictures = [decoded(vae, posterior_mean(vae, _unit(p.image))) for p in products]
    return _material([to_uint8(picture) for picture in pictures], [p.mask for p in products], size)


def half(preset: Preset, products: Sequence[Product], size: int) -> Material:
    """Both strands held to the real ones, noised, for the first half of the steps."""
    clean = _latents(products)
    levels = _levels()
    pairs: list[Pair] = []
    with Engine.from_pretrained(BASE, max_batch=BATCH) as engine:
        engine.load_adapter(preset.adapter, preset.name)
        for start in range(0, len(products), BATCH):
            part = clean[start : start + BATCH]
            seeds = list(range(start, start + len(part)))
            noise = torch.stack(
                [torch.randn(part.shape[1:], generator=_generator(seed)) for seed in seeds]
            )

            def held(
                engine: Engine,
                step: int,
                timestep: Any,
                state: dict[str, Tensor],
                part: Tensor = part,
                noise: Tensor = noise,
            ) -> dict[str, Tensor]:
                if step >= len(levels) // 2:
                    return state
                signal, deviation = levels[step + 1]
                return {"latents": signal * part + deviation * noise}

            pairs += engine.generate(
                seeds,
                latents=noise,
                callback_on_step_end=held,
                **preset.options(),
            )
    return _of_pairs(pairs, size)


def free(preset: Preset, products: Sequence[Product], size: int) -> Material:
    """As many pairs, drawn from noise alone."""
    pairs: list[Pair] = []
    with Engine.from_pretrained(BASE, max_batch=BATCH) as engine:
        engine.load_adapter(preset.adapter, preset.name)
        for start in range(0, len(products), demo_quality.SHARED):
            stop = min(start + demo_quality.SHARED, len(products))
            seeds = list(range(start, stop))
            pairs += engine.generate(seeds, **preset.options(start))
    return _of_pairs(pairs, size)


# in the order of the stages
ARMS = {UNTOUCHED: untouched, ROUND_TRIP: round_trip, HALF: half, FREE: free}


@torch.inference_mode()
def _latents(products: Sequence[Product]) -> Tensor:
    """[N, 2, 4, h, w]: of the picture and of the defect on black."""
    vae = BaseModel(BASE).load_vae(torch.device("cpu"), torch.float32)
    scale = vae.config.scaling_factor
    pairs = [[posterior_mean(vae, _unit(x)) for x in (p.image, p.anomaly)] for p in products]
    return torch.stack([torch.stack(pair) * scale for pair in pairs])


def _levels() -> list[tuple[float, float]]:
    """(signal, deviation of noise) of the latents at every call; of DPM-Solver++ in the demo."""
    scheduler = BaseModel(BASE).make_scheduler(SAMPLING["scheduler"])
    scheduler.set_timesteps(SAMPLING["steps"])
    signal = scheduler.alphas_cumprod[scheduler.timesteps].double()
    return [(float(s.sqrt()), float((1 - s).sqrt())) for s in signal]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _unit(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def _of_pairs(pairs: Sequence[Pair], size: int) -> Material:
    images = [np.asarray(pair.image) for pair in pairs]
    return _material(images, [np.asarray(pair.mask) for pair in pairs], size)


def _material(images: Sequence[Any], masks: Sequence[Any], size: int) -> Material:
    return Material(
        np.stack([reduced(image, size) for image in images]),
        np.stack([reduced_mask(mask > 0, size) for mask in masks]),
    )


if __name__ == "__main__":
    main()
