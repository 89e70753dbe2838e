"""A background picture -> latents -> shares of the image branch's keys and values.

The background pass does not depend on the sample: one pass per denoiser call serves a whole batch,
and with fixed noise every later batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualdiff_engine.device import spare_bytes
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pictures import object_mask_fault, open_picture
from dualdiff_engine.settings import Background, Prompts

Shares = Sequence[Tensor]
Pass = Callable[[Tensor, Sequence[Tensor]], list[Tensor]]


def opened(background: Background) -> Background:
    """The same with its pictures read, so that nothing is opened twice.

    Raises SettingsError for a picture that cannot be read, or a mask that has another size or
    cannot be an object's.
    """
    picture = open_picture(background.picture, "background picture", "RGB")
    mask = None
    if background.object_mask is not None:
        mask = open_picture(background.object_mask, "background object_mask", "L")
        if mask.size != picture.size:
            raise SettingsError(
                f"background object_mask is {mask.size}, its picture {picture.size}: "
                "they must match"
            )
        if fault := object_mask_fault(mask):
            raise SettingsError(f"background object_mask {fault}")
    return replace(background, picture=picture, object_mask=mask)


def cut_out(background: Background, height: int, width: int) -> np.ndarray:
    """The surroundings alone, uint8 [height, width, 3]: object pixels black."""
    background = opened(background)
    pixels = np.array(background.picture.resize((width, height), Image.Resampling.BICUBIC))
    if background.object_mask is not None:
        # nearest: a mask has no grey
        mask = background.object_mask.resize((width, height), Image.Resampling.NEAREST)
        pixels[np.array(mask) > 127] = 0
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

    def release(self) -> None:
        """Drop the shares that are kept; they are computed again, to the same values."""
        self._room += sum(share.nbytes for shares in self._kept.values() for share in shares)
        self._kept.clear()

    def _noised(self, draw: Tensor, timestep: Tensor) -> Tensor:
        # schedulers with fractional timesteps: the nearest one that was trained
        index = timestep.round().long().reshape(1).cpu()
        return self.noiser.add_noise(self.latents, draw.to(self.latents.device), index)


def record_of(
    background: Background, pixels: np.ndarray | None, noise: Tensor | None
) -> dict[str, Any]:
    """The background's part of a recipe; pixels and noise as for `BankStore.open`."""
    return {
        "noise": background.noise if noise is None else "given",
        "noise_seed": background.noise_seed,
        "picture_sha256": None if pixels is None else digest(pixels),
    }


class BankStore:
    """Keeps the last bank: with fixed noise, later runs reuse its keys and values."""

    def __init__(self) -> None:
        self._last: tuple[object, BackgroundBank] | None = None

    def clear(self) -> None:
        """Forget the bank: it belongs to one adapter."""
        self._last = None

    def release(self) -> None:
        """Drop what can be computed again."""
        if self._last is not None:
            self._last[1].release()

    def open(
        self,
        record: Mapping[str, Any],
        pixels: np.ndarray | None,
        latents: Tensor | None,
        noise: Tensor | None,
        *,
        shape: tuple[int, ...],
        prompts: Prompts,
        vae: Any,
        make_noiser: Callable[[], Any],
        device: torch.device,
    ) -> BackgroundBank:
        """A bank, the last one if nothing that it depends on changed.

        record: as from `record_of`. pixels: of the background, as from `cut_out`, or latents
        [2, 4, h, w] in their place. noise [calls, 2, 4, h, w] replaces the draws. shape: of the
        bank's latents, [R, 4, h, w].
        """
        # what a caller gave as a tensor has no name to be kept under
        key = (*record.values(), shape, prompts) if latents is None and noise is None else None
        if key is not None and self._last is not None and self._last[0] == key:
            return self._last[1]
        if latents is None:
            assert pixels is not None, "a background has pixels or latents"
            latents = encode(vae, pixels)
        rows = shape[0]
        bank = BackgroundBank(
            latents[-rows:].to(device),
            make_noiser(),
            str(record["noise"]) if noise is None else noise[:, -rows:],
            int(record["noise_seed"]),
            spare_bytes(device),
        )
        if key is not None:
            self._last = key, bank
        return bank
