"""One attention site in its trainable, unfolded form, as a processor of diffusers' attention.

It computes the method (https://arxiv.org/abs/2408.13509) as it is written: low-rank changes next to
the frozen weights, per branch, then the exchange of both branches; and our pattern of Double Helix
Diffusion, where `model.coupling` says so. `adapters.fold` folds what is learnt here; the two agree
up to rounding.

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
from dualdiff_engine.exchanges import INTERACTION, of_kind
from dualdiff_engine.exchanges.kind import linear
from dualdiff_engine.ops.reference import FLAT
from dualdiff_engine.settings import BRANCHES

# where the blend of the background starts (the paper's gamma)
_BLEND = 0.1


class LowRankLayer(nn.Module):
    """y = up(down(x)): what a branch adds to a frozen projection."""

    def __init__(self, inner: int, outer: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inner, rank, bias=False)
        self.up = nn.Linear(rank, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.up, linear(self.down, x))


class Scale(nn.Module):
    """How far the scores of the placeholder's tokens move with the other branch's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))


class TrainableSite(nn.Module):
    """The attention processor of one site; its parameters are named as in released adapters."""

    def __init__(
        self,
        channels: int,
        context: int,
        rank: int,
        strands: int,
        blend_width: int,
        exchange: str = INTERACTION,
        connects: bool = False,
        aligns: bool = False,
    ) -> None:
        """context: width of what keys and values read. strands: 2, with background 3.

        blend_width: inner width of the background's affine maps, 0 where the site has none. The
        last three: how the site is coupled, see `model.coupling.Block`.
        """
        super().__init__()
        self.strands, self.connects = strands, connects
        self.kind = of_kind(exchange)
        for part in PROJECTIONS:
            inner = context if part in ("k", "v") else channels
            layers = [LowRankLayer(inner, channels, rank) for _ in BRANCHES]
            setattr(self, f"to_{part}_lora", nn.ModuleList(layers))
        for name, layer in self.kind.layers(channels).items():
            setattr(self, name, layer)
        self.align: Scale | None = None
        # [2, B or 1, L]: 1 for the placeholder's tokens, set before each pass
        self.placeholder: Tensor | None = None
        if aligns:
            self.align = Scale()
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
                elif name.endswith(".bias") or ".up." in name or self._starts_at_zero(name):
                    parameter.zero_()
                elif ".down." in name:
                    parameter.normal_(std=1 / parameter.shape[0], generator=generator)
                else:
                    bound = 1 / math.sqrt(parameter.shape[1])
                    parameter.uniform_(-bound, bound, generator=generator)

    def _starts_at_zero(self, name: str) -> bool:
        return name in self.kind.zeros or name in ("temporal_condition_mlp.1.weight", "align.scale")

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
        if self.connects or self.align is not None:
            attended = self._attend_coupled(query, key, value, attn.heads)
            return self._adapted(attn.to_out[0], "out", attended)
        if context.shape[1] < hidden.shape[1]:
            # one prompt for all: their positions are one long row of queries
            query = query.flatten(1, 2).unsqueeze(1)
        query, key, value = (x.flatten(0, 1) for x in (query, key, value))
        attended = _attention(query, key, value, attn.heads)
        attended = attended.reshape(hidden.shape)
        return self._adapted(attn.to_out[0], "out", attended)

    def _attend_coupled(self, query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        """query [F, B, S, C], key and value [F, B or 1, L, C] -> [F, B, S, C].

        Branches that connect read the keys of both; the background reads its own.
        """
        key, value = (x.expand(-1, query.shape[1], -1, -1) for x in (key, value))
        moved = self._moved(query, key, heads)
        out = []
        for strand, rows in enumerate(query):
            keys, values = key[strand], value[strand]
            branch = {0: 0, len(query) - 1: 1}.get(strand)
            if self.connects and branch is not None:
                keys, values = (torch.cat([x[0], x[-1]], dim=1) for x in (key, value))
            bias = None if moved is None or branch is None else moved[branch].unsqueeze(1)
            out.append(_attention(rows, keys, values, heads, bias))
        return torch.stack(out)

    def _moved(self, query: Tensor, key: Tensor, heads: int) -> Tensor | None:
        """What the scores of both branches move by, [2, B, S, L]; None where nothing aligns."""
        if self.align is None or self.placeholder is None:
            return None
        places = self.placeholder.to(query)
        share = places / places.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.stack([key[0], key[-1]]).mul(share.unsqueeze(-1)).sum(-2)
        branches = torch.stack([query[0], query[-1]])
        looked = (branches * mean.unsqueeze(-2)).float().sum(-1)
        looked = looked / math.sqrt(query.shape[-1] * heads)
        moved = self.align.scale * _standardised(looked).flip(0)
        # in every prompt the placeholder is elsewhere
        return moved.to(query).unsqueeze(-1) * places.unsqueeze(-2)

    def _blended(self, hidden: Tensor) -> Tensor:
        """Input of keys and values; the image branch's is blended with the background."""
        if self.temporal_condition_mlp is None or self.temporal_a is None:
            return hidden
        reduce, expand = self.temporal_condition_mlp
        amount = self.temporal_a.to(hidden.dtype)
        learnt = linear(expand, linear(reduce, hidden[1:2]))
        return torch.cat([(1 - amount) * hidden[:1] + amount * learnt, hidden[1:]])

    def _interact(self, out: Tensor) -> Tensor:
        """out [strands, B, S, C]: both branches, after their exchange; the background as it is."""
        coupled = self.kind.unfolded(self, torch.stack([out[0], out[-1]]))
        return torch.cat([coupled[:1], out[1:-1], coupled[1:]])


def _attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None
) -> Tensor:
    """query [N, S, C], key and value [N, L, C], bias [N, 1, S, L] -> [N, S, C]."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(split[0], split[1], split[2], bias)
    return out.transpose(1, 2).flatten(2)


def _standardised(x: Tensor) -> Tensor:
    """Of mean 0 and deviation 1 over the last axis; 0 where it is flat."""
    centred = x - x.mean(-1, keepdim=True)
    # the slope of a root at zero is infinite, also where nothing uses it
    deviation = centred.square().mean(-1, keepdim=True).clamp(min=1e-30).sqrt()
    flat = deviation < FLAT * (1 + x.mean(-1, keepdim=True).abs())
    return torch.where(flat, torch.zeros_like(x), centred / deviation)
