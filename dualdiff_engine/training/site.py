"""One attention site in its trainable, unfolded form, as a processor of diffusers' attention.

It computes the method (https://arxiv.org/abs/2408.13509) as it is written: low-rank changes next to
the frozen weights, per branch, then the interaction of both branches. `adapters.fold` folds what is
learnt here; the two agree up to rounding.

Rows of the batch are stacked by strand: image, background if there is one, anomaly. The background
runs along as a third strand with the image branch's weights and no interaction, so that the image
branch finds its normed inputs in the same layer of the same pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.adapters.format import PROJECTIONS
from dualdiff_engine.settings import BRANCHES

_NORM_EPS = 1e-6
# where the blend of the background starts (the paper's gamma)
_BLEND = 0.1


def linear(layer: Any, x: Tensor) -> Tensor:
    """A trained fp32 layer on activations of any dtype."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class LowRankLayer(nn.Module):
    """y = up(down(x)): what a branch adds to a frozen projection."""

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inner, rank, bias=False)
        self.up = nn.Linear(rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.up, linear(self.down, x))


class TrainableSite(nn.Module):
    """The attention processor of one site; its parameters are named as in released adapters."""

    def __init__(
        self, channels: int, context: int, rank: int, strands: int, blend_width: int
    ) -> None:
        """context: width of what keys and values read. strands: 2, with background 3.

        blend_width: inner width of the background's affine maps, 0 where the site has none.
        """
        super().__init__()
        self.strands = strands
        for part in PROJECTIONS:
            inner = context if part in ("k", "v") else channels
            layers = [LowRankLayer(inner, channels, rank) for _ in BRANCHES]
            setattr(self, f"to_{part}_lora", nn.ModuleList(layers))
        self.temporal_n = nn.LayerNorm(channels, _NORM_EPS)
        for part in "iqkvo":
            setattr(self, f"temporal_{part}", nn.Linear(channels, channels))
        self.temporal_condition_mlp: nn.ModuleList | None = None
        self.temporal_a: nn.Parameter | None = None
        if blend_width:
            self.temporal_condition_mlp = nn.ModuleList(
                [nn.Linear(channels, blend_width), nn.Linear(blend_width, channels)]
            )
            self.temporal_a = nn.Parameter(torch.empty(1))

    def initialise(self, generator: torch.Generator) -> None:
        """Start at the base model: `up`, W_x and P_2 are zero, what they read is random."""
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if name == "temporal_a":
                    parameter.fill_(_BLEND)
                elif name == "temporal_n.weight":
                    parameter.fill_(1)
                elif name.endswith(".bias") or ".up." in name or _starts_at_zero(name):
                    parameter.zero_()
                elif ".down." in name:
                    parameter.normal_(std=1 / parameter.shape[0], generator=generator)
                else:
                    bound = 1 / math.sqrt(parameter.shape[1])
                    parameter.uniform_(-bound, bound, generator=generator)

    def forward(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        """hidden (normed) [strands·B, S, C]; encoder_hidden_states [2·B or 2, L, X], by branch.

        Returns the site's output [strands·B, S, C], without the block's residual.
        """
        stacked = hidden.unflatten(0, (self.strands, -1))
        if encoder_hidden_states is None:
            context = self._blended(stacked)
        else:
            context = encoder_hidden_states.unflatten(0, (len(BRANCHES), -1))
        out = self._attend(attn, stacked, context)
        return self._interact(out).flatten(0, 1)

    def _adapted(self, frozen: nn.Linear, part: str, x: Tensor) -> Tensor:
        """x [strands or branches, ...]: the last is the anomaly's, all before it the image's."""
        image, anomaly = getattr(self, f"to_{part}_lora")
        return frozen(x) + torch.cat([image(x[:-1]), anomaly(x[-1:])])

    def _attend(self, attn: Any, hidden: Tensor, context: Tensor) -> Tensor:
        """hidden [F, B, S, C], context [F or 2, B or 1, L, X] -> [F, B, S, C]."""
        query = self._adapted(attn.to_q, "q", hidden)
        key = self._adapted(attn.to_k, "k", context)
        value = self._adapted(attn.to_v, "v", context)
        if context.shape[0] < hidden.shape[0]:
            # the background reads the image's prompt, with the image's weights
            key, value = (torch.cat([x[:1], x]) for x in (key, value))
        if context.shape[1] < hidden.shape[1]:
            # one prompt for all: their positions are one long row of queries
            query = query.flatten(1, 2).unsqueeze(1)
        heads = [
            x.flatten(0, 1).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (query, key, value)
        ]
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
        attended = attended.transpose(1, 2).reshape(hidden.shape)
        return self._adapted(attn.to_out[0], "out", attended)

    def _blended(self, hidden: Tensor) -> Tensor:
        """Input of keys and values; the image branch's is blended with the background."""
        if self.temporal_condition_mlp is None or self.temporal_a is None:
            return hidden
        reduce, expand = self.temporal_condition_mlp
        amount = self.temporal_a.to(hidden.dtype)
        learnt = linear(expand, linear(reduce, hidden[1:2]))
        return torch.cat([(1 - amount) * hidden[:1] + amount * learnt, hidden[1:]])

    def _interact(self, out: Tensor) -> Tensor:
        """out [strands, B, S, C]: every position of a branch looks at itself and its partner.

        A softmax over two keys is the sigmoid of the difference of their scores.
        """
        branches = torch.stack([out[0], out[-1]])
        channels = out.shape[-1]
        norm = self.temporal_n
        normed = F.layer_norm(branches.float(), (channels,), norm.weight, norm.bias, norm.eps)
        entry = linear(self.temporal_i, normed.to(out.dtype))
        query, key, value = (
            linear(layer, entry) for layer in (self.temporal_q, self.temporal_k, self.temporal_v)
        )
        scores = (query * (key[0] - key[1])).float().sum(-1, keepdim=True) / math.sqrt(channels)
        mixed = value[1] + torch.sigmoid(scores).to(out.dtype) * (value[0] - value[1])
        coupled = branches + linear(self.temporal_o, mixed)
        return torch.cat([coupled[:1], out[1:-1], coupled[1:]])


def _starts_at_zero(name: str) -> bool:
    return name in ("temporal_o.weight", "temporal_condition_mlp.1.weight")
