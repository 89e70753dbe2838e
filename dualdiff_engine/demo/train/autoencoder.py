"""Trains the demo's autoencoder: a small AutoencoderKL that codes 4 x 4 pixels as 4 numbers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualdiff_engine.demo.factory.fields import SIZE, Bytes

STEPS, CROP_STEPS = 2000, 1600
CROP, BATCH, WHOLE_BATCH = 64, 16, 4
RATE = 2e-3
# per latent number
DIVERGENCE = 1e-4
EDGES = 1.0


CHANNELS = (16, 32, 64)


def build(channels: tuple[int, ...] = CHANNELS, groups: int = 8) -> Any:
    """groups: of the group norms."""
    from diffusers import AutoencoderKL

    levels = len(channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=SIZE,
        # latents are normalised in the weights, see `normalise`
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def as_tensor(pictures: list[Bytes]) -> Tensor:
    """uint8 [n, 3, SIZE, SIZE]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def to_unit(pictures: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1], channels-last."""
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _batch(pictures: Tensor, generator: torch.Generator, crop: int, count: int) -> Tensor:
    """Random pictures, mirrored and turned, cut to `crop`."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    chosen = []
    for _ in range(count):
        top, left = draw(SIZE - crop + 1), draw(SIZE - crop + 1)
        window = pictures[draw(len(pictures)), :, top : top + crop, left : left + crop]
        window = window.rot90(draw(4), (1, 2))
        chosen.append(window.flip(2) if draw(2) else window)
    return to_unit(torch.stack(chosen))


def _edges(difference: Tensor) -> Tensor:
    """Mean absolute difference of neighbours: what a blurred edge costs."""
    return difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()


def train(vae: Any, pictures: Tensor, seed: int, log: Any) -> dict[str, float]:
    """Train in place. pictures: uint8 [n, 3, SIZE, SIZE]. Returns the last losses.

    L1 plus L1 of the gradients plus the Kullback-Leibler divergence of AutoencoderKL (Rombach et
    al. 2022); crops first, whole pictures at the end, for the norms to see their statistics.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    start = time.monotonic()
    means: dict[str, float] = {}
    for step in range(STEPS):
        whole = step >= CROP_STEPS
        size = (SIZE, WHOLE_BATCH) if whole else (CROP, BATCH)
        images = _batch(pictures, generator, *size)
        posterior = vae.encode(images).latent_dist
        difference = vae.decode(posterior.sample()).sample - images
        # over latent numbers, where diffusers sums them
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        losses = {"l1": difference.abs().mean(), "edges": _edges(difference), "kl": divergence}
        loss = losses["l1"] + EDGES * losses["edges"] + DIVERGENCE * losses["kl"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in losses.items():
            means[name] = 0.98 * means.get(name, value.item()) + 0.02 * value.item()
        if step % 100 == 99:
            shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            log(f"vae {step + 1}/{STEPS} {shown} {time.monotonic() - start:.0f} s")
    vae.eval()
    return means


@torch.no_grad()
def encode(vae: Any, pictures: Tensor, batch: int = 16) -> Tensor:
    """Posterior means fp32 [n, 4, SIZE / 4, SIZE / 4] of uint8 pictures."""
    return torch.cat([vae.encode(to_unit(p)).latent_dist.mean for p in pictures.split(batch)])


@torch.no_grad()
def normalise(vae: Any, pictures: Tensor) -> None:
    """Give every latent channel mean 0 and deviation 1 over `pictures`, exactly, in the weights.

    Then the scaling factor is 1, and backgrounds, which DualAnoDiff codes without it, are on the
    scale of the latents. The 1 x 1 convolutions on both sides of the latents take it up.
    """
    latents = encode(vae, pictures)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    after = vae.post_quant_conv
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
    after.weight *= deviation[None, :, None, None]
    before = vae.quant_conv
    before.bias[:channels] = (before.bias[:channels] - mean) / deviation
    before.weight[:channels] /= deviation[:, None, None, None]
    # the second half is the posterior's log variance
    before.bias[channels:] -= 2 * deviation.log()


@torch.no_grad()
def error(vae: Any, pictures: Tensor, masks: Tensor | None = None) -> float:
    """Peak signal-to-noise ratio of coding and decoding, in dB.

    masks: bool [n, SIZE, SIZE]: only of the pixels in them.
    """
    if masks is None:
        masks = torch.ones_like(pictures[:, 0], dtype=torch.bool)
    total = 0.0
    for part, inside in zip(pictures.split(16), masks.split(16), strict=True):
        images = to_unit(part)
        decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
        total += float(((decoded - images) ** 2 * inside[:, None]).sum())
    mean = total / (3 * int(masks.sum())) / 4
    return float(-10 * np.log10(mean))
