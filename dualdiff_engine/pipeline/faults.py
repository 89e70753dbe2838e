"""Pairs that must not pass for good ones: not finite, or of one colour."""

from __future__ import annotations

import torch
from torch import Tensor

_ONE_COLOUR = "its image is of one colour"
_TRY = "try dtype float32, a lower guidance, another scheduler, or an earlier checkpoint"


class FiniteWatch:
    """Notes the first step at which each pair of a batch stops being finite.

    Every pair is looked at alone: its neighbours do not depend on it and stay good. Nothing is read
    from the device before `first_bad`.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def look(self, step: int, latents: Tensor) -> None:
        """After a step; latents [B, 2, 4, h, w]."""
        bad = ~torch.isfinite(latents).flatten(1).all(1)
        if self._first is None:
            self._first = torch.full_like(bad, -1, dtype=torch.long)
        self._first = torch.where(bad & (self._first < 0), step, self._first)

    def first_bad(self) -> list[int]:
        """Per pair the step, -1 where every step was finite."""
        return [] if self._first is None else self._first.tolist()


def of_latents(step: int, dtype: torch.dtype) -> str | None:
    """Why a pair with this first bad step cannot be used."""
    if step < 0:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"its latents are not finite from step {step} on, in {name}: {_TRY}"


def of_pictures(image: Tensor, anomaly: Tensor) -> str | None:
    """Why decoded pictures [3, H, W] cannot be used."""
    for name, picture in (("image", image), ("anomaly image", anomaly)):
        if not bool(torch.isfinite(picture).all()):
            return f"the VAE's {name} is not finite: {_TRY}"
    low, high = torch.aminmax(image.flatten(1), dim=1)
    if bool((high - low < 0.5 / 255).all()):
        return f"{_ONE_COLOUR}: {_TRY}"
    return None


def kind_of(reason: str) -> str:
    """What a reason says in a word: black, for one colour, or not_finite."""
    return "black" if reason.startswith(_ONE_COLOUR) else "not_finite"
