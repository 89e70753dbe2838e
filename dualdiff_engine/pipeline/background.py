"""A background picture -> latents -> shares of the image branch's keys and values.

The background pass does not depend on the sample: one pass per denoiser call serves a whole batch,
and with fixed noise every later batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Background

# larger pictures are refused before they are decoded
MAX_PIXELS = 64_000_000

Shares = Sequence[Tensor]
Pass = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def open_picture(picture: Any, name: str, mode: str) -> Image.Image:
    """A path, PIL image or uint8 array as a PIL image of `mode`. Raises SettingsError."""
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise SettingsError(
                        f"{name} {str(picture)!r} has more than {MAX_PIXELS:,} pixels"
                    )
                return opened.convert(mode)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise SettingsError(f"{name}: {str(picture)!r} is not a readable picture") from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise SettingsError(
                f"{name} array must be uint8 [H, W] or [H, W, 3], "
                f"got {picture.dtype} {list(picture.shape)}"
            )
        return Image.fromarray(picture).convert(mode)
    if isinstance(picture, Image.Image):
        return picture.convert(mode)
    raise SettingsError(f"{name} must be a path, a PIL image or a uint8 array, got {type(picture)}")


def cut_out(background: Background, height: int, width: int) -> np.ndarray:
    """The surroundings alone, uint8 [height, width, 3]: object pixels black."""
    picture = open_picture(background.picture, "background picture", "RGB")
    pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    if background.object_mask is not None:
        mask = open_picture(background.object_mask, "background object_mask", "L")
        if mask.size != picture.size:
            raise SettingsError(
                f"background object_mask is {mask.size}, its picture {picture.size}: "
                "they must match"
            )
        # nearest: a mask has no grey
        pixels[np.array(mask.resize((width, height), Image.Resampling.NEAREST)) > 127] = 0
    return pixels


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def encode(vae: Any, pixels: np.ndarray) -> Tensor:
    """Latents [2, 4, h, w] fp32 of (a mid-grey picture, the background), posterior means.

    As released, they are not multiplied by the VAE's scaling factor.
    """
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    both = torch.cat([torch.zeros_like(picture), picture]).to(vae.device, vae.dtype)
    return torch.cat([vae.encode(x[None]).latent_dist.mean for x in both]).float()


def fresh_noise(shape: tuple[int, ...], seed: int) -> Iterator[Tensor]:
    """New noise for every call, the same sequence for every batch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator)


def fixed_noise(shape: tuple[int, ...], seed: int, timestep: float) -> Tensor:
    """The noise that belongs to a timestep."""
    mixed = hashlib.sha256(f"{seed}:{timestep:.6f}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
    return torch.randn(shape, generator=generator)


class BackgroundBank:
    """Shares per denoiser call of one (background, adapter, prompt, size).

    latents [R, 4, h, w] fp32. noiser: DDPM's add_noise. noise: `fresh`, `fixed`, or the draws
    themselves [calls, R, 4, h, w]. With fixed noise, shares are kept while they fit `budget` bytes.
    """

    def __init__(
        self, latents: Tensor, noiser: Any, noise: str | Tensor, seed: int, budget: int
    ) -> None:
        self.latents, self.noiser, self.noise, self.seed = latents, noiser, noise, seed
        self._room = budget
        self._kept: dict[float, list[Tensor]] = {}
        self.rewind()

    def rewind(self) -> None:
        """Start the noise of a batch."""
        shape = tuple(self.latents.shape)
        if isinstance(self.noise, Tensor):
            self._draws = iter(self.noise)
        else:
            self._draws = fresh_noise(shape, self.seed)

    def shares(self, timestep: Tensor, time_bias: Sequence[Tensor], run: Pass) -> Shares:
        """The shares for the next call; run(noised latents, time_bias) is the background pass."""
        if isinstance(self.noise, Tensor) or self.noise == "fresh":
            return run(self._noised(next(self._draws), timestep), time_bias)
        key = float(timestep)
        if key not in self._kept:
            draw = fixed_noise(tuple(self.latents.shape), self.seed, key)
            shares = run(self._noised(draw, timestep), time_bias)
            size = sum(share.nbytes for share in shares)
            if size > self._room:
                return shares
            self._room -= size
            self._kept[key] = shares
        return self._kept[key]

    def _noised(self, draw: Tensor, timestep: Tensor) -> Tensor:
        # schedulers with fractional timesteps: the nearest one that was trained
        index = timestep.round().long().reshape(1).cpu()
        return self.noiser.add_noise(self.latents, draw.to(self.latents.device), index)
