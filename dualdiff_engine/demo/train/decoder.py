"""Widens the decoder of the demo's autoencoder and trains it further; the latents stay.

What the denoiser and the adapters know are latents, so a better decoder serves them as they are.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.demo.factory.fields import SIZE
from dualdiff_engine.demo.train.autoencoder import EDGES, build, encode, to_unit

CHANNELS = (32, 64, 128)
STEPS, CROP_STEPS = 2800, 2500
# in latent pixels, of four picture pixels
CROP, BATCH, WHOLE, WHOLE_BATCH = 16, 16, SIZE // 4, 4
RATE = 1e-3
# what a pixel of a defect, or within two of one, weighs more than another
FOCUS, NEAR = 6.0, 5


def widen(vae: Any) -> Any:
    """An autoencoder of `CHANNELS` that computes what `vae` does, to the last digits.

    New channels of the encoder are zero, and stay so. Those of the decoder are random, and no
    channel that was there before reads them.
    """
    wide = build(CHANNELS, groups=CHANNELS[0] // 2)
    old, new = vae.state_dict(), wide.state_dict()
    for name, value in new.items():
        known = old[name]
        if known.shape != value.shape:
            if name.startswith(("encoder", "quant")):
                value.zero_()
            else:
                value[: known.shape[0]] = 0
        value[tuple(slice(size) for size in known.shape)] = known
    wide.load_state_dict(new)
    return wide.eval()


@dataclass(frozen=True)
class Shown:
    """What is learnt from: pictures uint8 [n, 3, SIZE, SIZE], masks bool [n, SIZE, SIZE] of the
    defects in them, latents fp32 [n, 4, SIZE / 4, SIZE / 4]."""

    pictures: Tensor
    masks: Tensor
    latents: Tensor


def shown(vae: Any, pictures: Tensor, masks: Tensor) -> Shown:
    return Shown(pictures, masks, encode(vae, pictures))


def train(vae: Any, material: Shown, seed: int, log: Any) -> float:
    """Train the decoder in place, on latents as they are. Returns the last mean loss.

    L1 plus L1 of the gradients, weighted towards defects, in bfloat16 where autocast takes it;
    crops first, whole pictures at the end, for the norms to see their statistics.
    """
    trained = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    start, mean = time.monotonic(), 0.0
    vae.train()
    for step, (latents, pictures, weight) in enumerate(_batches(material, seed)):
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(latents).sample
        loss = _loss(decoded.float() - to_unit(pictures), weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        if step % 100 == 99:
            log(f"decoder {step + 1}/{STEPS} loss {mean:.4f} {time.monotonic() - start:.0f} s")
    vae.eval()
    return mean


def _batches(material: Shown, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(latents, pictures, weights [b, 1, h, w]): crops, half of those of defects around them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    for step in range(STEPS):
        side, count = (CROP, BATCH) if step < CROP_STEPS else (WHOLE, WHOLE_BATCH)
        chosen = [draw(len(material.pictures)) for _ in range(count)]
        parts = []
        for number in chosen:
            mask = material.masks[number]
            top, left = draw(WHOLE - side + 1), draw(WHOLE - side + 1)
            if side == CROP and mask.any() and draw(2):
                places = mask.nonzero()
                row, column = places[draw(len(places))].tolist()
                top = min(max(row // 4 - draw(side), 0), WHOLE - side)
                left = min(max(column // 4 - draw(side), 0), WHOLE - side)
            fine = slice(4 * top, 4 * (top + side)), slice(4 * left, 4 * (left + side))
            coarse = slice(top, top + side), slice(left, left + side)
            parts.append(
                (
                    material.latents[number][:, *coarse],
                    material.pictures[number][:, *fine],
                    mask[fine],
                )
            )
        latents, pictures, masks = (torch.stack(each) for each in zip(*parts, strict=True))
        near = F.max_pool2d(masks.float()[:, None], NEAR, 1, NEAR // 2)
        weight = 1 + FOCUS * near
        yield latents, pictures, weight / weight.mean()


def _loss(difference: Tensor, weight: Tensor) -> Tensor:
    pixels = (difference.abs() * weight).mean()
    rows = (difference.diff(dim=2).abs() * weight[:, :, 1:]).mean()
    columns = (difference.diff(dim=3).abs() * weight[:, :, :, 1:]).mean()
    return pixels + EDGES * (rows + columns)
