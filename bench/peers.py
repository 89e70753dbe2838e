"""The peers of a benchmark: each predicts the guided noise of a whole batch, its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dualdiff_engine import weights
from dualdiff_engine.bench.case import Case, RandomWeights, diffusers_unet, random_adapter
from dualdiff_engine.bench.released import ReleasedUNet
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import bind

META = torch.device("meta")


class Peer(Protocol):
    """Built from a case; `step` is what is timed."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None: ...

    def step(self, index: int) -> Tensor:
        """Guided noise [B, 2, 4, h, w] fp32 at the index-th timestep."""
        ...


def noised(case: Case, inputs: dict[str, Tensor], index: int) -> Tensor:
    """DDPM's add_noise on SD's scaled-linear schedule; the same draw in every step."""
    from diffusers import DDPMScheduler

    scheduler: Any = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    alpha = scheduler.alphas_cumprod[int(case.timesteps[index])]
    return alpha.sqrt() * inputs["background"] + (1 - alpha).sqrt() * inputs["noise"]


def filled_unet(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    unet = diffusers_unet(case.model)
    if device != META:
        base = RandomWeights.of(case.model, case.seed)
        unet.load_state_dict({n: base[n].to(device, dtype) for n in base}, assign=True)
    return unet


class Released:
    """The released computation, one pair per call, in fp32 whatever the others use."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.inputs = case, case.inputs(device)
        base = RandomWeights.of(case.model, case.seed)
        adapter = random_adapter(base, background=case.background)
        self.unet = ReleasedUNet(
            filled_unet(case, device, torch.float32), adapter_on(adapter, device)
        )
        # [2 branches, 2 rows] -> rows, branches: branch fastest
        self.context = self.inputs["context"].transpose(0, 1).flatten(0, 1)
        self.timesteps = case.timesteps.to(device)

    def step(self, index: int) -> Tensor:
        case, timestep = self.case, self.timesteps[index]
        guided = []
        for pair in self.inputs["latents"]:
            if case.background:
                latents = noised(case, self.inputs, index)
                self.unet.background_pass(latents, timestep, self.context[0::2])
            noise = self.unet(torch.cat([pair, pair]), timestep, self.context)
            uncond, cond = noise.chunk(2)
            guided.append(uncond + case.guidance * (cond - uncond))
        return torch.stack(guided)


def adapter_on(adapter: Any, target: torch.device | torch.dtype) -> Any:
    """The adapter with its tensors on another device or in another dtype."""
    from dataclasses import fields, is_dataclass, replace

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


class Diffusers:
    """The same UNet by diffusers, uncoupled, all rows in one batch: what two branches must cost."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.inputs, self.dtype = case, case.inputs(device), dtype
        self.unet = filled_unet(case, device, dtype)
        rows = self.inputs["context"].transpose(0, 1)[:, None]
        self.context = rows.expand(2, case.batch, 2, -1, -1).flatten(0, 2).to(dtype)
        self.timesteps = case.timesteps.to(device)

    def step(self, index: int) -> Tensor:
        latents = self.inputs["latents"].flatten(0, 1).to(self.dtype)
        noise = self.unet(torch.cat([latents, latents]), self.timesteps[index], self.context).sample
        uncond, cond = noise.float().unflatten(0, (2, self.case.batch, 2))
        return uncond + self.case.guidance * (cond - uncond)


class Engine:
    """The engine's network and ops; with a background, its shares kept as `noise="fixed"` does."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.inputs = case, case.inputs(device)
        counted = device == META
        self.ops = bind("reference" if counted else "auto", device=device, dtype=dtype)
        unet = diffusers_unet(case.model)
        config = UNetConfig.from_dict(unet.config)
        self.unet = DualUNet(config, self.ops, background=case.background)
        if not counted:
            base = RandomWeights.of(case.model, case.seed)
            adapter = random_adapter(base, background=case.background)
            self.unet.load(weights.fold_network(base, device, dtype))
            self.unet.load(weights.fold_sites(base, adapter.sites, device, dtype))
        self.time_bias = self.unet.time_bias(case.timesteps.to(device))
        self.text = self.unet.text_projections(self.inputs["context"].to(dtype))
        self.kept: dict[int, Sequence[Tensor]] = {}

    def background(self, index: int) -> Sequence[Tensor]:
        latents = noised(self.case, self.inputs, index)
        return self.unet.background_shares(latents, self.time_bias[index], self.text)

    def step(self, index: int) -> Tensor:
        shares = None
        if self.case.background:
            if index not in self.kept:
                self.kept[index] = self.background(index)
            shares = self.kept[index]
        latents = self.inputs["latents"].transpose(0, 1).unsqueeze(1)
        noise = self.unet(latents, self.time_bias[index], self.text, shares)
        return self.ops.guided_step(noise, self.case.guidance).transpose(0, 1)


class EngineFresh(Engine):
    """As `engine`, with a background pass in every step, as `noise="fresh"` does."""

    def step(self, index: int) -> Tensor:
        self.kept.clear()
        return super().step(index)


PEERS: dict[str, type[Peer]] = {
    "released": Released,
    "diffusers": Diffusers,
    "engine": Engine,
    "engine-fresh": EngineFresh,
}
