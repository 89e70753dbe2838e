"""Keep the latents outside a region at the noised latents of a picture, at every step.

With a region's weight m in [0, 1] at latent resolution, after every step

    latents <- m · latents + (1 - m) · (scale · clean + sigma · noise)

where clean is the normal picture's latents (image branch) and those of black (anomaly branch),
noise the pair's own initial noise, and (scale, sigma) the scheduler's noise level at the next call:
blended latent diffusion (Avrahami et al., arXiv 2206.02779). After the last step the level is
(1, 0).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# (scale, sigma): latents = scale · clean + sigma · noise
Level = tuple[float, float]


def noise_levels(scheduler: Any) -> list[Level]:
    """The noise level that latents have at every call of a scheduler, and after the last: (1, 0).

    scheduler: fresh, steps already set; it is used up. Three families of diffusers: schedulers
    without sigmas index `alphas_cumprod` by the timestep; those that keep the variance turn a sigma
    into (alpha, sigma) themselves; the others keep clean latents at scale 1 and divide their input
    by sqrt(sigma² + 1), which tells the sigma also between two steps (Heun, KDPM2).
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        kept = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
        levels = [(math.sqrt(share), math.sqrt(1 - share)) for share in kept]
    elif hasattr(scheduler, "_sigma_to_alpha_sigma_t"):
        pairs = (
            scheduler._sigma_to_alpha_sigma_t(sigma) for sigma in sigmas[: len(scheduler.timesteps)]
        )
        levels = [(float(alpha), float(sigma)) for alpha, sigma in pairs]
    else:
        levels = [(1.0, sigma) for sigma in _input_sigmas(scheduler)]
    return [*levels, (1.0, 0.0)]


def _input_sigmas(scheduler: Any) -> list[float]:
    """The sigma of the input of every call, by a dry run: some depend on where the last one was."""
    options: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options = {"generator": torch.Generator().manual_seed(0)}
    # every sigma that a scheduler has tabulated; what lies between two steps may be missing
    table = [scheduler.sigmas, getattr(scheduler, "sigmas_interpol", scheduler.sigmas[:0])]
    # KDPM2's ends in NaN: the logarithm of its last sigma, 0
    known = torch.cat([sigmas[sigmas.isfinite()].double().cpu() for sigmas in table])
    latents, found = torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    with torch.random.fork_rng(devices=[]):
        for timestep in scheduler.timesteps:
            scale = float(scheduler.scale_model_input(torch.ones_like(latents), timestep))
            sigma = math.sqrt(max(scale**-2 - 1, 0.0))
            # the scale of a small sigma is nearly 1, in fp32: the table has its other digits
            near = float(known[(known - sigma).abs().argmin()])
            found.append(near if abs(near - sigma) < 1e-3 * sigma else sigma)
            noise = torch.zeros_like(latents)
            latents = scheduler.step(noise, timestep, latents, **options).prev_sample
    return found


class Blend:
    """Keeps what lies outside the regions of a batch at the noise level of each call.

    change [B, h, w]; clean and noise [B, 2, 4, h, w]; all fp32 on one device. levels: as from
    `noise_levels`. Nothing is read from the device, and a call is three elementwise products.
    """

    def __init__(
        self, change: Tensor, clean: Tensor, noise: Tensor, levels: Sequence[Level]
    ) -> None:
        self._change = change[:, None, None]
        keep = 1 - self._change
        self._clean, self._noise, self._levels = keep * clean, keep * noise, levels

    def __call__(self, latents: Tensor, call: int) -> Tensor:
        """latents [B, 2, 4, h, w] at the input of a call, or after the last, blended."""
        scale, sigma = self._levels[call]
        blended = latents * self._change
        return blended.add_(self._clean, alpha=scale).add_(self._noise, alpha=sigma)

    def attach(self, scheduler: Any) -> None:
        """Blend also what a scheduler makes of its input before it steps.

        UniPC computes the input of a call again with that call's prediction (its corrector), from
        states of its own: the blended input would be lost.
        """
        if hasattr(scheduler, "multistep_uni_c_bh_update"):
            correct = scheduler.multistep_uni_c_bh_update

            def corrected(*arguments: Any, **named: Any) -> Tensor:
                return self(correct(*arguments, **named), scheduler.step_index)

            scheduler.multistep_uni_c_bh_update = corrected
