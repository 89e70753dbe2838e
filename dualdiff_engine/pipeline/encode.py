"""Pictures -> latents, each distinct one once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualdiff_engine.pipeline.decode import decoded

# latents of as many pictures are kept: 64 KiB each at 512 x 512
MOST_KEPT = 256
# what the VAE makes of them: 3 MiB each
MOST_REBUILT = 16
# (sha256, height, width)
_Key = tuple[str, int, int]


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
    """Encodes every distinct picture once, as long as it is among the last ones."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._kept: OrderedDict[_Key, Tensor] = OrderedDict()
        self._rebuilt: OrderedDict[_Key, Tensor] = OrderedDict()

    def of(self, pixels: np.ndarray) -> Tensor:
        """`posterior_mean` of a picture uint8 [H, W, 3]."""

        def encoded() -> Tensor:
            picture = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
            return posterior_mean(self._vae, picture)

        return _once(self._kept, MOST_KEPT, (digest(pixels), *pixels.shape[:2]), encoded)

    def rebuilt(self, pixels: np.ndarray) -> Tensor:
        """A picture as the VAE decodes its latents again, [3, H, W] fp32 in [0, 1] on the CPU."""
        key = (digest(pixels), *pixels.shape[:2])
        return _once(self._rebuilt, MOST_REBUILT, key, lambda: decoded(self._vae, self.of(pixels)))

    def grey(self, height: int, width: int) -> Tensor:
        """`posterior_mean` of a mid-grey picture, which no uint8 picture is."""
        grey = torch.zeros(3, height, width)
        key = ("grey", height, width)
        return _once(self._kept, MOST_KEPT, key, lambda: posterior_mean(self._vae, grey))


def _once(
    kept: OrderedDict[_Key, Tensor], most: int, key: _Key, make: Callable[[], Tensor]
) -> Tensor:
    """What was made under a key before, if it is among the last; else made now."""
    if key not in kept:
        kept[key] = make()
    kept.move_to_end(key)
    if len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
