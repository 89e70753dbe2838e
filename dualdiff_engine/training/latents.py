"""Training pictures as latents, encoded once, and what a step draws from them.

A step depends only on the seed and its number, so a resumed run needs no random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualdiff_engine.pipeline import background as backgrounds
from dualdiff_engine.training.data import Example
from dualdiff_engine.training.options import TrainingOptions

# (left-right, up-down)
_FLIPS = {
    "none": [(False, False)],
    "horizontal": [(False, False), (True, False)],
    "vertical": [(False, False), (False, True)],
    "both": [(False, False), (True, False), (False, True), (True, True)],
}


@dataclass(frozen=True)
class Draw:
    """What one optimizer step sees of B pictures, on the CPU.

    latents, noise [B, 2, 4, h, w]; timesteps [B], one for both branches; dropped [B], whether the
    prompts are empty; background, background_noise [B, 4, h, w] or None.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    dropped: Tensor
    background: Tensor | None
    background_noise: Tensor | None

    def split(self, size: int) -> Iterator[Draw]:
        """Parts of `size` pictures."""
        whole: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for start in range(0, len(self.timesteps), size):
            part = slice(start, start + size)
            parts: dict[str, Any] = {n: None if t is None else t[part] for n, t in whole.items()}
            yield Draw(**parts)


@dataclass(frozen=True)
class LatentSet:
    """Posteriors of N pictures in V flips.

    mean, deviation [N, V, 2, 4, h, w], times the VAE's scaling factor; background [N, V, 4, h, w]
    and grey [4, h, w] without that factor, as the released programs feed them, or None.
    """

    mean: Tensor
    deviation: Tensor
    background: Tensor | None
    grey: Tensor | None

    def draw(self, options: TrainingOptions, step: int, timesteps: int) -> Draw:
        """Pictures, flips, noises and timesteps (below `timesteps`) of a step, counted from 0."""
        generator = generator_of(options.seed, f"step {step}")
        count = options.per_step
        chosen = torch.tensor(order_of(len(self.mean), options.seed, step * count, count))
        flips = torch.randint(self.mean.shape[1], (count,), generator=generator)
        times = torch.randint(timesteps, (count,), generator=generator)
        dropped = torch.rand(count, generator=generator) < options.prompt_dropout
        latents = self.mean[chosen, flips]
        noise = torch.randn(latents.shape, generator=generator)
        if options.latents == "sample":
            draw = torch.randn(latents.shape, generator=generator)
            latents = latents + self.deviation[chosen, flips] * draw
        if self.background is None or self.grey is None:
            return Draw(latents, noise, times, dropped, None, None)
        surroundings = torch.where(
            dropped[:, None, None, None], self.grey, self.background[chosen, flips]
        )
        background_noise = torch.randn(surroundings.shape, generator=generator)
        return Draw(latents, noise, times, dropped, surroundings, background_noise)


def generator_of(seed: int, what: str) -> torch.Generator:
    """Of one purpose in a run."""
    mixed = hashlib.sha256(f"{seed} {what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))


def order_of(pictures: int, seed: int, start: int, count: int) -> list[int]:
    """Positions start … start + count - 1 of epochs that are each shuffled anew."""
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, position = divmod(start + len(chosen), pictures)
        shuffled = torch.randperm(pictures, generator=generator_of(seed, f"epoch {epoch}"))
        chosen += shuffled[position : position + count - len(chosen)].tolist()
    return chosen


@torch.inference_mode()
def encode(
    vae: Any, examples: Sequence[Example], options: TrainingOptions, size: int, bar: Any = None
) -> LatentSet:
    """Encode every picture in every flip; size: pixels of a side. bar: updated by picture."""
    means, deviations, surroundings = [], [], []
    grey = None
    scale = float(vae.config.scaling_factor)
    for example in examples:
        pair = np.stack([example.image(size), example.annotation(size, options.annotation)])
        for flip in _FLIPS[options.flips]:
            posterior = vae.encode(_as_input(_flipped(pair, flip), vae)).latent_dist
            means.append(posterior.mean.float().cpu() * scale)
            deviations.append(posterior.std.float().cpu() * scale)
            if options.background:
                pixels = _flipped(example.surroundings(size)[None], flip)[0]
                grey, latents = backgrounds.encode(vae, pixels).cpu()
                surroundings.append(latents)
        if bar is not None:
            bar.update()
    shape = (len(examples), len(_FLIPS[options.flips]))
    mean, deviation = (torch.stack(x).unflatten(0, shape) for x in (means, deviations))
    background = torch.stack(surroundings).unflatten(0, shape) if surroundings else None
    # tensors of inference mode cannot take part in a graph: hand out copies
    with torch.inference_mode(False):
        return LatentSet(mean.clone(), deviation.clone(), _copy(background), _copy(grey))


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _flipped(pictures: np.ndarray, flip: tuple[bool, bool]) -> np.ndarray:
    """pictures [n, H, W, 3]."""
    if flip[0]:
        pictures = pictures[:, :, ::-1]
    if flip[1]:
        pictures = pictures[:, ::-1]
    return np.ascontiguousarray(pictures)


def _as_input(pictures: np.ndarray, vae: Any) -> Tensor:
    """uint8 [n, H, W, 3] -> [n, 3, H, W] in [-1, 1]."""
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return tensor.to(vae.device, vae.dtype)
