"""Networks that trace in seconds: random weights, and the heads that SD-1.5 has."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualdiff_engine import Engine, adapters
from dualdiff_engine.bench.step.case import RandomWeights, random_tensors
from support import DATA

# heads of width 40 and 160, as at SD-1.5's ends; or of 40 in the middle alone, the least there is
WIDE, LEAST = (80, 320), (32, 80)
# most that a pixel of a pair may differ, in [0, 1]
PICTURES = 2e-4
# of the adapter
NAME = "bottle_broken"


def small_engine(folder: Path, channels: tuple[int, ...], *, background: bool = False) -> Engine:
    """An engine with an adapter on the golden model's text encoder and VAE."""
    from diffusers import UNet2DConditionModel

    if not folder.exists():
        shutil.copytree(DATA / "dual" / "model", folder, ignore=shutil.ignore_patterns("unet"))
        attends = "CrossAttn" if channels == WIDE else ""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=16,
                block_out_channels=channels,
                layers_per_block=1,
                attention_head_dim=2,
                cross_attention_dim=32,
                norm_num_groups=16,
                down_block_types=[f"{attends}DownBlock2D", "DownBlock2D"],
                up_block_types=["UpBlock2D", f"{attends}UpBlock2D"],
            )
        unet.save_pretrained(folder / "unet")
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    engine.keep_adapter(adapters.parse(small_adapter(engine, 1, background=background)), NAME)
    return engine


def small_adapter(engine: Engine, seed: int, *, background: bool = False) -> dict[str, Tensor]:
    """What the file of an adapter for this engine holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in engine.base.unet.items()}
    return random_tensors(RandomWeights(shapes, seed), background=background, rank=4)


def other_adapter(path: Path) -> Path:
    """The golden plain adapter with every matrix changed."""
    from dualdiff_engine import adapters

    adapters.convert(DATA / "dual" / "adapter", path)
    tensors = load_file(path)
    draw = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            tensors[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=draw)
    save_file(tensors, path)
    return path
