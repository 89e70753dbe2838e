"""The denoising loop. Schedulers are diffusers'; no scheduler knows that there are branches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import Ops
from dualdiff_engine.pipeline.background import BackgroundBank
from dualdiff_engine.settings import Sampling

# (step, timestep, latents [B, 2, 4, h, w]) -> latents to go on with, or None to stop
StepEnd = Callable[[int, Tensor, Tensor], Tensor | None]


def draw_latents(generators: Sequence[torch.Generator], height: int, width: int) -> Tensor:
    """Standard normal [B, 2, 4, height, width] fp32, each pair from its own CPU generator."""
    return torch.stack([torch.randn(2, 4, height, width, generator=g) for g in generators])


def denoise(
    unet: DualUNet | GraphedDenoiser,
    ops: Ops,
    scheduler: Any,
    latents: Tensor,
    text: Sequence[Tensor],
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    background: BackgroundBank | None,
    step_end: StepEnd,
) -> Tensor | None:
    """Clean latents [B, 2, 4, h, w] fp32 from standard normal ones, or None when stopped.

    scheduler: fresh, steps already set. text: as from `DualUNet.text_projections`, with as many
    guidance rows as the sampling has. Latents and scheduler arithmetic stay in fp32.
    """
    timesteps = scheduler.timesteps
    time_bias = unet.time_bias(timesteps)
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        # a list makes diffusers draw each pair's noise from its own generator
        extra["generator"] = list(generators)
    if background is not None:
        background.rewind()

    def background_pass(noised: Tensor, bias: Sequence[Tensor]) -> list[Tensor]:
        return unet.background_shares(noised, bias, text)

    latents = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(timesteps):
        bias = time_bias[step]
        shares = background.shares(timestep, bias, background_pass) if background else None
        scaled = scheduler.scale_model_input(latents, timestep)
        noise = unet(scaled.transpose(0, 1).unsqueeze(1), bias, text, shares)
        guided = (
            ops.guided_step(noise, sampling.guidance) if sampling.guided else noise[:, 0].float()
        )
        latents = scheduler.step(guided.transpose(0, 1), timestep, latents, **extra).prev_sample
        kept = step_end(step, timestep, latents)
        if kept is None:
            return None
        latents = kept
    return latents
