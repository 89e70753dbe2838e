"""Pictures -> latents."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# latents of as many pictures are kept: 64 KiB each at 512 x 512
MOST_KEPT = 256


def digest(pixels: np.ndarray) -> str:
    """What a recipe calls a picture by."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def posterior_mean(vae: Any, picture: Tensor) -> Tensor:
    """Latents [4, h, w] fp32 of a picture [3, H, W] in [-1, 1], before the VAE's scaling factor.

    vae: diffusers' AutoencoderKL, or what has its calls. The mean, not a draw: no randomness. One
    picture at a time: its latents must not depend on a batch.
    """
    mean: Tensor = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist.mean
    return mean[0].float()


class PictureLatents:
    """Encodes every distinct picture once, as long as it is among the last `MOST_KEPT`."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._kept: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()

    def of(self, pixels: np.ndarray) -> Tensor:
        """`posterior_mean` of a picture uint8 [H, W, 3]."""
        height, width, _ = pixels.shape

        def picture() -> Tensor:
            return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1

        return self._encoded((digest(pixels), height, width), picture)

    def grey(self, height: int, width: int) -> Tensor:
        """`posterior_mean` of a mid-grey picture, which no uint8 picture is."""
        return self._encoded(("grey", height, width), lambda: torch.zeros(3, height, width))

    def _encoded(self, key: tuple[str, int, int], picture: Callable[[], Tensor]) -> Tensor:
        if key not in self._kept:
            self._kept[key] = posterior_mean(self._vae, picture())
        self._kept.move_to_end(key)
        if len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        return self._kept[key]
