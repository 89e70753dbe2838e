"""The denoising loop. Schedulers are diffusers'; no scheduler knows that there are branches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.ops import Ops
from dualdiff_engine.pipeline.background import Bank
from dualdiff_engine.pipeline.blend import Blend, Level, noise_levels
from dualdiff_engine.settings import ChosenSampling

# (step, timestep, latents [B, 2, 4, h, w]) -> latents to go on with, or None to stop
StepEnd = Callable[[int, Tensor, Tensor], Tensor | None]


class Schedule:
    """The schedulers of one run: a fresh one per batch, all with the same timesteps.

    make: a new scheduler. calls: denoiser calls of a batch, which some schedulers have more of than
    steps. Timesteps and tables stay on the CPU: a step that indexes by a timestep on a GPU waits
    for all that the GPU has to do.
    """

    def __init__(self, make: Callable[[], Any], steps: int) -> None:
        self._make, self._steps = make, steps
        self._unused: Any = self._made()
        self.calls = len(self._unused.timesteps)

    def fresh(self) -> Any:
        """A scheduler that has not stepped, its timesteps set."""
        scheduler, self._unused = self._unused or self._made(), None
        return scheduler

    def noise_levels(self) -> list[Level]:
        """Of the latents at every call, and after the last; see `blend.noise_levels`."""
        return noise_levels(self._made())

    def _made(self) -> Any:
        scheduler = self._make()
        scheduler.set_timesteps(self._steps, device="cpu")
        return scheduler


def draw_latents(generators: Sequence[torch.Generator], height: int, width: int) -> Tensor:
    """Standard normal [B, 2, 4, height, width] fp32, each pair from its own CPU generator."""
    return torch.stack([torch.randn(2, 4, height, width, generator=g) for g in generators])


def denoise(
    denoiser: Denoiser,
    ops: Ops,
    scheduler: Any,
    latents: Tensor,
    text: Sequence[Tensor],
    sampling: ChosenSampling,
    generators: Sequence[torch.Generator],
    background: Bank | None,
    step_end: StepEnd,
    blend: Blend | None = None,
) -> Tensor | None:
    """Clean latents [B, 2, 4, h, w] fp32 from standard normal ones, or None when stopped.

    scheduler: fresh, steps already set, on the CPU. text: as from `Denoiser.text_inputs`, with as
    many guidance rows as the sampling has. blend: what keeps the latents outside a placement.
    Latents and scheduler arithmetic stay in fp32.
    """
    timesteps = scheduler.timesteps
    time_inputs = denoiser.time_inputs(timesteps.to(latents.device))
    extra: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        # a list makes diffusers draw each pair's noise from its own generator
        extra["generator"] = list(generators)
    if background is not None:
        background.rewind()

    def background_pass(noised: Tensor, time: Sequence[Tensor]) -> list[Tensor]:
        return denoiser.background_shares(noised, time, text)

    latents = latents * scheduler.init_noise_sigma
    if blend is not None:
        blend.attach(scheduler)
        latents = blend(latents, 0)
    for step, timestep in enumerate(timesteps):
        time = time_inputs[step]
        shares = background.shares(timestep, time, background_pass) if background else None
        scaled = scheduler.scale_model_input(latents, timestep)
        noise = denoiser(scaled.transpose(0, 1).unsqueeze(1), time, text, shares)
        guided = (
            ops.guided_step(noise, sampling.guidance) if sampling.guided else noise[:, 0].float()
        )
        latents = scheduler.step(guided.transpose(0, 1), timestep, latents, **extra).prev_sample
        if blend is not None:
            latents = blend(latents, step + 1)
        kept = step_end(step, timestep, latents)
        if kept is None:
            return None
        latents = kept
    return latents
