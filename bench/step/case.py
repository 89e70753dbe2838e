"""What is benchmarked: the demo's network or one with random weights, and its inputs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import adapters, settings
from dualdiff_engine.adapters import fold
from dualdiff_engine.base_model import TensorFile
from dualdiff_engine.demo.presets import BASE, PRESETS
from dualdiff_engine.errors import BackendError
from dualdiff_engine.model.attention_site import AttentionSite, TextSite
from dualdiff_engine.model.blocks import ResnetBlock
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import bind

TEXT_TOKENS = 77
RANK = 32
BLEND = 0.1
MLP_WIDTH = 320

# a diffusers `unet/config.json`
SD15: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "sd15": SD15,
    "small": {
        **SD15,
        "sample_size": 24,
        "block_out_channels": (64, 128, 256, 256),
        "cross_attention_dim": 192,
        "norm_num_groups": 16,
    },
    # for kernels that are interpreted: every kind of layer, and not many of them
    "tiny": {
        **SD15,
        "sample_size": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
}
# the demo's network and one of its adapters, as they ship
DEMO = "demo"
MODELS[DEMO] = json.loads((BASE / "unet" / "config.json").read_text("utf-8"))
# pixels of a latent's side
SCALE = {model: 4 if model == DEMO else 8 for model in MODELS}
WHY = {
    DEMO: "the demo model at 128 px, trained: the full network takes minutes per step here",
    "sd15": "the full SD-1.5 network",
    "small": "SD-1.5 at a fifth of its width, 192 px: the full network takes minutes per step here",
    "tiny": "two levels, 32 px: what interpreted kernels can do",
}


@dataclass(frozen=True)
class Case:
    """One benchmark case; every peer makes its weights and inputs from it alone.

    batch: pairs per step. steps: denoiser calls of the schedule, of which some are timed. height,
    width: latent size. scale: pixels of a latent's side. preset: where `steps` comes from.
    """

    model: str
    batch: int
    steps: int
    height: int
    width: int
    guidance: float
    background: bool
    seed: int
    scale: int = 8
    preset: str | None = None

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


def calls_of(preset: str | None, background: bool) -> int:
    """Denoiser calls of a run on SD-1.5; without a preset the released steps, a round number."""
    steps = settings.BACKGROUND_STEPS if background else settings.PLAIN_STEPS
    if preset is None:
        return steps
    # SD-1.5's own PNDM visits its second timestep twice; DPM-Solver++ calls once per step
    return settings.PRESETS[preset].steps or steps + 1


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32, a function of its name alone."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network_config(model: str) -> UNetConfig:
    return UNetConfig.from_dict(MODELS[model])


def unet_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a diffusers UNet's tensors, without diffusers."""
    config = network_config(model)
    unet = DualUNet(config, bind("reference"), branches=1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in unet.named_parameters():
        if not name.startswith("time_table."):
            projection = ".proj_" in name and name.endswith("weight")
            square = () if config.linear_projection or not projection else (1, 1)
            shapes[fold.diffusers_name(name)] = (*parameter.shape, *square)
    for name, module in unet.named_modules():
        theirs = fold.diffusers_name(name)
        if isinstance(module, ResnetBlock):
            outer = module.conv1.out_channels
            shapes[f"{theirs}.conv1.bias"] = (outer,)
            shapes[f"{theirs}.time_emb_proj.weight"] = (outer, config.time_width)
            shapes[f"{theirs}.time_emb_proj.bias"] = (outer,)
        elif isinstance(module, AttentionSite):
            width = module.channels
            context = config.context_width if isinstance(module, TextSite) else width
            for part, read in (("q", width), ("k", context), ("v", context), ("out.0", width)):
                shapes[f"{theirs}.to_{part}.weight"] = (width, read)
            shapes[f"{theirs}.to_out.0.bias"] = (width,)
    return shapes


def diffusers_unet(model: str) -> Any:
    """An empty diffusers UNet on the meta device. Raises BackendError without diffusers."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise BackendError("this peer needs diffusers: pip install diffusers") from error

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(MODELS[model])
    return unet.eval().requires_grad_(False)


class RandomWeights(Mapping[str, Tensor]):
    """The tensors of a diffusers UNet, drawn when asked for: activations keep their scale."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self.shapes, self.seed = shapes, seed

    @classmethod
    def of(cls, model: str, seed: int) -> RandomWeights:
        return cls(unet_shapes(model), seed)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        drawn = draw(f"{self.seed}/{name}", shape)
        if len(shape) > 1:
            return drawn / math.sqrt(math.prod(shape[1:]))
        return 1 + 0.1 * drawn if "norm" in name and name.endswith("weight") else 0.02 * drawn

    def drawn(self) -> dict[str, Tensor]:
        """All of them, on every core."""
        with ThreadPoolExecutor() as pool:
            return dict(zip(self, pool.map(self.__getitem__, self), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def base_weights(model: str, seed: int) -> Mapping[str, Tensor]:
    """The tensors of a diffusers UNet by name, fp32; the random ones drawn when asked for."""
    if model == DEMO:
        file = TensorFile(BASE / "unet" / "diffusion_pytorch_model.safetensors")
        return {name: file[name].float() for name in file}
    return RandomWeights.of(model, seed)


def adapter_of(model: str, seed: int, *, background: bool) -> adapters.Adapter:
    """An adapter that fits the model, fp32."""
    if model != DEMO:
        return random_adapter(RandomWeights.of(model, seed), background=background)
    preset = next(preset for preset in PRESETS.values() if preset.background == background)
    return adapter_on(adapters.load(preset.adapter), torch.float32)


def adapter_on(adapter: Any, target: torch.device | torch.dtype) -> Any:
    """The adapter with its tensors on another device or in another dtype."""
    if isinstance(adapter, Tensor):
        return adapter.to(target)
    if isinstance(adapter, dict):
        return {name: adapter_on(value, target) for name, value in adapter.items()}
    if isinstance(adapter, tuple):
        return tuple(adapter_on(value, target) for value in adapter)
    if is_dataclass(adapter) and not isinstance(adapter, type):
        moved = {f.name: adapter_on(getattr(adapter, f.name), target) for f in fields(adapter)}
        return replace(adapter, **moved)
    return adapter


def random_adapter(base: RandomWeights, *, background: bool, rank: int = RANK) -> adapters.Adapter:
    """An adapter in the released format for every site of the base, as strong as trained ones."""
    return adapters.parse(random_tensors(base, background=background, rank=rank))


def random_tensors(base: RandomWeights, *, background: bool, rank: int = RANK) -> dict[str, Tensor]:
    """What the file of a `random_adapter` holds."""
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
    return {name: _adapter_tensor(drawn, name) for name in shapes}


def _adapter_tensor(drawn: RandomWeights, name: str) -> Tensor:
    if name.endswith("temporal_a"):
        return torch.tensor([BLEND])
    if name.endswith("temporal_n.weight"):
        return 1 + 5 * drawn[name]
    return drawn[name] * (0.3 if ".up." in name else 1.0)
