"""The released computation, re-stated from its formulas: what the engine is measured against.

One pair per call, branches one after the other, LoRA next to the weights, the interaction with all
its ten products, the background pass in every step, everything in fp32. Also the unfolded oracle of
the tests. Rows are in released order: [rows, branches], branch fastest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.adapters.format import Adapter, LowRank, SiteAdapter
from dualdiff_engine.exchanges.kind import Affine


def affine(x: Tensor, layer: Affine) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def adapted(linear: torch.nn.Linear, lora: LowRank, x: Tensor) -> Tensor:
    """A layer and its LoRA, not merged."""
    return linear(x) + F.linear(F.linear(x, lora.down), lora.up)


class ReleasedSite:
    """The attention processor of one site, for diffusers' `set_attn_processor`."""

    def __init__(self, site: SiteAdapter, name: str) -> None:
        self.site, self.name = site, name
        # set by ReleasedUNet: whether this is the background pass, and what that pass left behind
        self.writing = False
        self.background: Tensor | None = None
        self.output: Tensor | None = None

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        if self.writing:
            if encoder_hidden_states is None:
                self.background = hidden
            return self._attend(attn, 0, hidden, encoder_hidden_states)
        branches = []
        for branch in (0, 1):
            rows = hidden[branch::2]
            context = None
            if encoder_hidden_states is not None:
                context = encoder_hidden_states[branch::2]
            elif branch == 0 and self.background is not None:
                context = self._blend(rows)
            branches.append(self._attend(attn, branch, rows, context))
        self.output = self._interact(torch.stack(branches, dim=1)).flatten(0, 1)
        return self.output

    def _attend(self, attn: Any, branch: int, hidden: Tensor, context: Tensor | None) -> Tensor:
        lora: Mapping[str, LowRank] = self.site.lora[branch]
        context = hidden if context is None else context
        projected = (
            adapted(attn.to_q, lora["q"], hidden),
            adapted(attn.to_k, lora["k"], context),
            adapted(attn.to_v, lora["v"], context),
        )
        query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return adapted(attn.to_out[0], lora["out"], out)

    def _blend(self, hidden: Tensor) -> Tensor:
        blend = self.site.background
        assert blend is not None
        assert self.background is not None
        learnt = affine(affine(self.background, blend.reduce), blend.expand)
        return (1 - blend.amount) * hidden + blend.amount * learnt

    def _interact(self, out: Tensor) -> Tensor:
        """[rows, 2, S, C]: softmax over the branches at every position, one head of width C."""
        part = self.site.parts
        tokens = out.transpose(1, 2)
        channels = tokens.shape[-1]
        norm = part["norm"]
        normed = F.layer_norm(tokens, (channels,), norm.weight, norm.bias, 1e-6)
        entry = affine(normed, part["input"])
        query, key, value = (affine(entry, part[name]) for name in ("query", "key", "value"))
        scores = query @ key.transpose(-1, -2) / math.sqrt(channels)
        mixed = affine(torch.softmax(scores, -1) @ value, part["output"])
        return (tokens + mixed).transpose(1, 2)


class ReleasedUNet:
    """A diffusers UNet with released sites; unet and adapter on one device, in one dtype."""

    def __init__(self, unet: Any, adapter: Adapter) -> None:
        self.unet = unet
        names = [name.removesuffix(".processor") for name in unet.attn_processors]
        self.sites = {name: ReleasedSite(adapter.sites[name], name) for name in names}
        unet.set_attn_processor({f"{n}.processor": site for n, site in self.sites.items()})

    def background_pass(self, latents: Tensor, timestep: Tensor, context: Tensor) -> None:
        """latents [R, 4, h, w] noised to the timestep; context [R, L, X] of the image branch."""
        self._write(True)
        self.unet(latents, timestep, context)
        self._write(False)

    def _write(self, writing: bool) -> None:
        for site in self.sites.values():
            site.writing = writing

    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """latents [R·2, 4, h, w], context [R·2, L, X], branch fastest -> noise [R·2, 4, h, w]."""
        return self.unet(latents, timestep, context).sample
