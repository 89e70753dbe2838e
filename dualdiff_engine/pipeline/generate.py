"""From a checked request to pairs: batches drawn, decoded and masked one after the other."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from dualdiff_engine import memory
from dualdiff_engine.errors import OutOfMemoryError, SettingsError
from dualdiff_engine.pair import Pair, present, present_mask, to_uint8
from dualdiff_engine.pipeline.background import BackgroundBank
from dualdiff_engine.pipeline.denoise import denoise, draw_latents
from dualdiff_engine.pipeline.masks import MaskResult
from dualdiff_engine.settings import Sampling

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine

# diffusers' convention: (engine, step, timestep, {"latents": [B, 2, 4, h, w]}) -> the same dict
StepCallback = Callable[["Engine", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Job:
    """What the batches of a request share; text as from `DualUNet.text_projections`."""

    adapter: str | None
    seeds: tuple[int, ...]
    batch: int
    sampling: Sampling
    text: list[Tensor]
    bank: BackgroundBank | None
    latents: Tensor | None
    segment: Callable[[Any], MaskResult]
    output_type: str
    callback: StepCallback | None
    progress: bool
    recipe: dict[str, Any]


@torch.inference_mode()
def draw_pairs(engine: Engine, job: Job) -> Generator[Pair, None, None]:
    """Pairs in the order of their seeds, until done or interrupted. Raises OutOfMemoryError.

    Raises SettingsError when the adapter is switched between two batches.
    """
    starts = range(0, len(job.seeds), job.batch)
    calls = len(engine.scheduler(job.sampling).timesteps)
    with tqdm(total=calls * len(starts), disable=not job.progress, unit="step") as bar:
        for start in starts:
            if engine.active_adapter != job.adapter:
                raise SettingsError(
                    f"the stream draws with {job.adapter!r}, which is no longer active: finish or "
                    "close a stream before switching adapters"
                )
            clean = _draw(engine, job, start, bar)
            if clean is None:
                return
            for seed, latents in zip(job.seeds[start:], clean, strict=False):
                yield _pair(engine, job, seed, latents)


def _draw(engine: Engine, job: Job, start: int, bar: tqdm[Any]) -> Tensor | None:
    """Clean latents [B, 2, 4, h, w] of one batch, or None when interrupted."""
    seeds = job.seeds[start : start + job.batch]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    latents = draw_latents(generators, *engine.latent_size(job.sampling))
    if job.latents is not None:
        latents = job.latents[start : start + len(seeds)]

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        bar.update()
        if job.callback is not None:
            changed = job.callback(engine, step, timestep, {"latents": latents}) or {}
            latents = changed.get("latents", latents)
        return None if engine.interrupted else latents

    try:
        return denoise(
            engine.denoiser,
            engine.ops,
            engine.scheduler(job.sampling),
            latents.to(engine.device),
            job.text,
            job.sampling,
            generators,
            job.bank,
            step_end,
        )
    except (RuntimeError, MemoryError) as error:
        if not memory.is_out_of_memory(error):
            raise
    # outside the handler, so that the failed batch's tensors are gone
    raise OutOfMemoryError(len(seeds), _largest_that_fits(engine, job, len(seeds) // 2))


def _largest_that_fits(engine: Engine, job: Job, batch: int) -> int:
    """Halve until one denoiser call goes through."""
    bias = engine.unet.time_bias(torch.zeros(1, device=engine.device))[0]
    size = engine.latent_size(job.sampling)
    while batch:
        try:
            engine.denoiser(
                torch.zeros(2, 1, batch, 4, *size, device=engine.device), bias, job.text
            )
            return batch
        except (RuntimeError, MemoryError) as error:
            if not memory.is_out_of_memory(error):
                raise
        batch //= 2
    return 0


def _pair(engine: Engine, job: Job, seed: int, latents: Tensor) -> Pair:
    """Decode [2, 4, h, w], one picture at a time: its pixels must not depend on a batch."""
    vae = engine.vae
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    decoded = torch.cat([vae.decode(x[None]).sample for x in scaled])
    image, anomaly = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()
    found = job.segment(to_uint8(anomaly))
    mask = {
        "threshold": float(found.threshold),
        "area": float(found.area),
        "empty": bool(found.empty),
    }
    return Pair(
        image=present(image, job.output_type),
        anomaly=present(anomaly, job.output_type),
        mask=present_mask(found.mask, job.output_type),
        seed=seed,
        empty_mask=bool(found.empty),
        recipe={**job.recipe, "seed": seed, "mask": mask},
    )
