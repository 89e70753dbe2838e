"""A background picture -> latents -> shares of the image branch's keys and values.

The background pass does not depend on the sample: one pass per denoiser call serves a whole batch,
and with fixed noise every later batch. Pairs may have backgrounds of their own, in one pass, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualdiff_engine.device import spare_bytes
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pictures import object_mask_fault, open_picture
from dualdiff_engine.pipeline.encode import PictureLatents, digest
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
    return blacked_out(background.picture, background.object_mask, height, width)


def blacked_out(
    picture: Image.Image, object_mask: Image.Image | None, height: int, width: int
) -> np.ndarray:
    """The same of opened pictures, or of windows of them, which may be all object."""
    pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    if object_mask is not None:
        # nearest: a mask has no grey
        mask = object_mask.resize((width, height), Image.Resampling.NEAREST)
        pixels[np.array(mask) > 127] = 0
    return pixels


def encode(vae: Any, pixels: np.ndarray) -> Tensor:
    """Latents [2, 4, h, w] fp32 of (a mid-grey picture, the background), posterior means.

    As released, they are not multiplied by the VAE's scaling factor.
    """
    return _grey_and_picture(PictureLatents(vae), pixels)


def _grey_and_picture(latents: PictureLatents, pixels: np.ndarray) -> Tensor:
    return torch.stack([latents.grey(*pixels.shape[:2]), latents.of(pixels)])


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
        key = float(timestep)
        if key in self._kept:
            return self._kept[key]
        shares = run(self.noised(timestep), time_bias)
        size = sum(share.nbytes for share in shares)
        if self._fixed and size <= self._room:
            self._room -= size
            self._kept[key] = shares
        return shares

    def noised(self, timestep: Tensor) -> Tensor:
        """Latents [R, 4, h, w] of the next call, with its noise."""
        if self._fixed:
            draw = fixed_noise(tuple(self.latents.shape), self.seed, float(timestep))
        else:
            draw = next(self._draws)
        return self._noised(draw, timestep)

    @property
    def _fixed(self) -> bool:
        return isinstance(self.noise, str) and self.noise == "fixed"

    def release(self) -> None:
        """Drop the shares that are kept; they are computed again, to the same values."""
        self._room += sum(share.nbytes for shares in self._kept.values() for share in shares)
        self._kept.clear()

    def _noised(self, draw: Tensor, timestep: Tensor) -> Tensor:
        # schedulers with fractional timesteps: the nearest one that was trained
        index = timestep.round().long().reshape(1).cpu()
        return self.noiser.add_noise(self.latents, draw.to(self.latents.device), index)


class BankOfEach:
    """The shares of a batch whose pairs have backgrounds of their own: one pass for all of them.

    banks: one per pair; pairs with one background share one. Nothing is kept between batches: every
    pair has shares of its own, which would fill the memory.
    """

    def __init__(self, banks: Sequence[BackgroundBank]) -> None:
        self._pairs = tuple(banks)
        self._distinct = list(dict.fromkeys(banks))
        places = [self._distinct.index(bank) for bank in banks]
        self._places = torch.tensor(places, device=banks[0].latents.device)
        self.rewind()

    def first(self, pairs: int) -> BankOfEach:
        """Of the first pairs of the batch."""
        return BankOfEach(self._pairs[:pairs])

    def rewind(self) -> None:
        """Start the noise of a batch."""
        for bank in self._distinct:
            bank.rewind()

    def shares(self, timestep: Tensor, time_bias: Sequence[Tensor], run: Pass) -> Shares:
        """As `BackgroundBank.shares`, of R·B rows [R·B, S, 2·C]: rows, then pairs."""
        noised = torch.stack([bank.noised(timestep) for bank in self._distinct], dim=1)
        shares = run(noised.flatten(0, 1), time_bias)
        if len(self._distinct) == len(self._pairs):
            return shares
        split = (noised.shape[0], len(self._distinct))
        return [x.unflatten(0, split).index_select(1, self._places).flatten(0, 1) for x in shares]


Bank = BackgroundBank | BankOfEach


@dataclass(frozen=True)
class Surroundings:
    """A checked background.

    record: its part of a recipe. pixels: makes what is encoded, uint8 [H, W, 3]; None where latents
    were given, or each pair's seed makes its own.
    """

    record: dict[str, Any]
    pixels: Callable[[], np.ndarray] | None

    @classmethod
    def of(
        cls, background: Background, size: tuple[int, int], noise: Tensor | None
    ) -> Surroundings:
        """size: (height, width). Opens the pictures. Raises SettingsError."""
        pixels = cut_out(background, *size)
        return cls(record_of(background, pixels, noise), lambda: pixels)


def listed(
    background: Background | Sequence[Background] | None, pairs: int
) -> tuple[Background, ...]:
    """None, one for all, or one per pair. Raises SettingsError for what is none of these."""
    if background is None:
        return ()
    several = [background] if isinstance(background, Background) else background
    if not isinstance(several, list | tuple) or not all(isinstance(b, Background) for b in several):
        raise SettingsError(
            f"background must be Background(…) or a list of them, got {type(background).__name__}"
        )
    if len(several) not in (1, pairs):
        raise SettingsError(
            f"background lists {len(several)} for {pairs} pairs: give one per pair, or one for all"
        )
    return tuple(several)


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
        pixels: Callable[[], np.ndarray] | None,
        latents: Tensor | None,
        noise: Tensor | None,
        *,
        shape: tuple[int, ...],
        prompts: Prompts,
        encoded: PictureLatents,
        make_noiser: Callable[[], Any],
        device: torch.device,
    ) -> BackgroundBank:
        """A bank, the last one if nothing that it depends on changed.

        record: as from `record_of`. pixels: makes those of the background, as from `cut_out`; or
        latents [2, 4, h, w] in their place. noise [calls, 2, 4, h, w] replaces the draws. shape: of
        the bank's latents, [R, 4, h, w].
        """
        # what a caller gave as a tensor has no name to be kept under
        key = (*record.values(), shape, prompts) if latents is None and noise is None else None
        if key is not None and self._last is not None and self._last[0] == key:
            return self._last[1]
        if latents is None:
            assert pixels is not None, "a background has pixels or latents"
            latents = _grey_and_picture(encoded, pixels())
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
