"""Clean latents -> pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def decode(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Image and anomaly image, each [3, H, W] fp32 in [0, 1] on the CPU.

    vae: diffusers' AutoencoderKL, or what has its calls. latents [2, 4, h, w] of one pair. One
    picture at a time: its pixels must not depend on a batch. What is not finite stays so.
    """
    scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    decoded = torch.cat([vae.decode(x[None]).sample for x in scaled])
    image, anomaly = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()
    return image, anomaly
