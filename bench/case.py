"""What is benchmarked: a network with random weights, its inputs, and nothing downloaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import adapters

TEXT_TOKENS = 77
RANK = 32
BLEND = 0.1
MLP_WIDTH = 320

# diffusers UNet2DConditionModel arguments that differ from its defaults, which are SD-1.5's shape
MODELS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "sample_size": 64},
    "small": {
        "cross_attention_dim": 192,
        "sample_size": 24,
        "block_out_channels": (64, 128, 256, 256),
        "norm_num_groups": 16,
    },
}
WHY = {
    "sd15": "the full SD-1.5 network",
    "small": "SD-1.5 at a fifth of its width, 192 px: the full network takes minutes per step here",
}


@dataclass(frozen=True)
class Case:
    """One benchmark case; every peer makes its weights and inputs from it alone.

    batch: pairs per step. steps: denoiser calls of the schedule, of which some are timed. height,
    width: latent size.
    """

    model: str
    batch: int
    steps: int
    height: int
    width: int
    guidance: float
    background: bool
    seed: int

    @property
    def timesteps(self) -> Tensor:
        return torch.linspace(999, 1, self.steps).round()

    def draw(self, name: str, *shape: int) -> Tensor:
        return draw(f"{self.seed}/{name}", shape)

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """latents [B, 2, 4, h, w], context [2, 2, L, X], background and noise [2, 4, h, w]."""
        size = (4, self.height, self.width)
        width = MODELS[self.model]["cross_attention_dim"]
        drawn = {
            "latents": self.draw("latents", self.batch, 2, *size),
            "context": self.draw("context", 2, 2, TEXT_TOKENS, width),
            "background": self.draw("background", 2, *size),
            "noise": self.draw("noise", 2, *size),
        }
        return {name: tensor.to(device) for name, tensor in drawn.items()}


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32, a function of its name alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def diffusers_unet(model: str) -> Any:
    """An empty diffusers UNet on the meta device."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**MODELS[model])
    return unet.eval().requires_grad_(False)


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a diffusers UNet, drawn when asked for: activations keep their scale."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.shapes, self.seed = shapes, seed

    @classmethod
    def of(cls, model: str, seed: int) -> RandomWeights:
        tensors = diffusers_unet(model).state_dict()
        return cls({name: tuple(t.shape) for name, t in tensors.items()}, seed)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        drawn = draw(f"{self.seed}/{name}", shape)
        if len(shape) > 1:
            return drawn / math.sqrt(math.prod(shape[1:]))
        return 1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else 0.02 * drawn

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def random_adapter(base: RandomWeights, *, background: bool, rank: int = RANK) -> adapters.Adapter:
    """An adapter in the released format for every site of the base, as strong as trained ones."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, (channels, _) in (
        (k, v) for k, v in base.shapes.items() if k.endswith(".to_q.weight")
    ):
        site = key.removesuffix(".to_q.weight")
        context = base.shapes[f"{site}.to_k.weight"][1]
        chained = "chained_proc." if background and site.endswith("attn1") else ""
        prefix = f"unet.{site}.processor.{chained}"
        for part in ("q", "k", "v", "out"):
            width = context if part in ("k", "v") else channels
            for branch in (0, 1):
                shapes[f"{prefix}to_{part}_lora.{branch}.down.weight"] = (rank, width)
                shapes[f"{prefix}to_{part}_lora.{branch}.up.weight"] = (channels, rank)
        for part in "niqkvo":
            square = (channels,) if part == "n" else (channels, channels)
            shapes[f"{prefix}temporal_{part}.weight"] = square
            shapes[f"{prefix}temporal_{part}.bias"] = (channels,)
        if background:
            shapes[f"{prefix}temporal_a"] = (1,)
            shapes[f"{prefix}temporal_condition_mlp.0.weight"] = (MLP_WIDTH, channels)
            shapes[f"{prefix}temporal_condition_mlp.0.bias"] = (MLP_WIDTH,)
            shapes[f"{prefix}temporal_condition_mlp.1.weight"] = (channels, MLP_WIDTH)
            shapes[f"{prefix}temporal_condition_mlp.1.bias"] = (channels,)
    drawn = RandomWeights(shapes, base.seed)
    return adapters.parse({name: _adapter_tensor(drawn, name) for name in shapes})


def _adapter_tensor(drawn: RandomWeights, name: str) -> Tensor:
    if name.endswith("temporal_a"):
        return torch.tensor([BLEND])
    if name.endswith("temporal_n.weight"):
        return 1 + 5 * drawn[name]
    return drawn[name] * (0.3 if ".up." in name else 1.0)
