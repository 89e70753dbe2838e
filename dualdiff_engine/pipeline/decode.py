"""Clean latents -> pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def decode(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Image and anomaly image, each [3, H, W] fp32 in [0, 1] on the CPU.

    vae: diffusers' AutoencoderKL, or what has its calls. latents [2, 4, h, w] of one pair. One
    picture at a time: its pixels must not depend on a batch. What is not finite stays so.
    """
    image, anomaly = (decoded(vae, x / vae.config.scaling_factor) for x in latents)
    return image, anomaly


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Picture [3, H, W] fp32 in [0, 1] on the CPU of latents [4, h, w] without scaling factor."""
    picture: Tensor = vae.decode(latents[None].to(vae.dtype)).sample[0]
    return (picture.float() / 2 + 0.5).clamp(0, 1).cpu()
