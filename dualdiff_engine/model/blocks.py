"""The blocks of the network. Maps are [N, C, h, w] channels-last; tokens are views of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.model import doubling
from dualdiff_engine.model.attention_site import SelfSite, TextSite
from dualdiff_engine.model.call import Call
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.coupling import ALIGN, CONNECT, Block
from dualdiff_engine.ops import Ops

# fixed in the transformer of SD-1.x and SD-2.x, not in their configs
TRANSFORMER_NORM_EPS = 1e-6


class Plan:
    """Hands out positions: resnets to the time table, sites to the text and background lists."""

    def __init__(self, config: UNetConfig, ops: Ops, branches: int, background: bool) -> None:
        self.config, self.ops = config, ops
        self.branches, self.background = branches, background
        self.time_widths: list[int] = []
        self.sites = 0

    def resnet(self, inner: int, outer: int) -> ResnetBlock:
        self.time_widths.append(outer)
        return ResnetBlock(self, len(self.time_widths) - 1, inner, outer)

    def transformer(self, channels: int, level: int) -> Transformer:
        config = self.config
        return Transformer(self, channels, config.heads[level], config.transformer_layers[level])

    def next_site(self) -> int:
        self.sites += 1
        return self.sites - 1


class Convolution(nn.Conv2d):
    """PyTorch's, computed by the ops that are bound."""

    def __init__(
        self,
        ops: Ops,
        inner: int,
        outer: int,
        width: int,
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__(inner, outer, width, stride, padding, bias=bias)
        self.ops = ops

    def forward(self, input: Tensor) -> Tensor:
        """input [N, C, h, w] channels-last -> [N, D, h', w']."""
        return self.ops.convolution(input, self.weight, self.bias, self.stride, self.padding)


class Upsampling(Convolution):
    """A convolution on a map that is made as large as the next one, by nearest neighbours."""

    def __init__(self, ops: Ops, channels: int) -> None:
        super().__init__(ops, channels, channels, 3, padding=1)
        # no buffers: those are what adapters bring
        self._folded: list[Tensor] = []

    def fold(self) -> None:
        """Have exact doublings computed as four 2 x 2 convolutions, by the weight as it is now."""
        self._folded = doubling.kernels(self.weight)

    def release(self) -> None:
        """Drop the folded weight."""
        self._folded = []

    def upsample(self, x: Tensor, size: torch.Size) -> Tensor:
        """x [N, C, h, w] -> [N, C, *size]."""
        exact = size[0] == 2 * x.shape[2] and size[1] == 2 * x.shape[3]
        if self._folded and exact and not torch.compiler.is_exporting():
            return doubling.doubled(x, self._folded, self.bias)
        # odd sizes: double to the size of the map that comes next, as diffusers does
        return self(F.interpolate(x, size=size, mode="nearest"))


class ResnetBlock(nn.Module):
    """conv(silu(norm(x))) twice and a shortcut; the timestep enters as the first conv's bias."""

    def __init__(self, plan: Plan, index: int, inner: int, outer: int) -> None:
        super().__init__()
        groups, eps = plan.config.norm_groups, plan.config.norm_eps
        self.ops, self.index = plan.ops, index
        # of the second norm, which has other channels
        self.out_ops = plan.ops
        self.norm1 = nn.GroupNorm(groups, inner, eps)
        self.conv1 = Convolution(plan.ops, inner, outer, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, outer, eps)
        self.conv2 = Convolution(plan.ops, outer, outer, 3, padding=1)
        other = inner != outer
        self.conv_shortcut = Convolution(plan.ops, inner, outer, 1) if other else nn.Identity()

    def forward(self, x: Tensor, call: Call) -> Tensor:
        hidden = norm_silu(self.ops, self.norm1, x)
        bias = call.time_bias[self.index]
        hidden = self.ops.convolution(hidden, self.conv1.weight, bias, padding=1)
        hidden = norm_silu(self.out_ops, self.norm2, hidden)
        return self.conv2(hidden).add_(self.conv_shortcut(x))


def norm_silu(ops: Ops, norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


class TransformerBlock(nn.Module):
    """Self site, text site, feed-forward, each on a LayerNorm of what came before."""

    def __init__(self, plan: Plan, channels: int, heads: int) -> None:
        super().__init__()
        ops, branches = plan.ops, plan.branches
        index = plan.next_site()
        self.ops = ops
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = SelfSite(ops, index, channels, heads, branches, plan.background)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = TextSite(ops, index, channels, heads, branches, plan.config.context_width)
        self.norm3 = nn.LayerNorm(channels)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)
        self.last = False

    def couple(self, block: Block) -> None:
        """Couple both sites."""
        self.attn1.couple(block.exchange)
        self.attn1.connects = block.attention == CONNECT
        self.attn2.aligns = block.text == ALIGN
        scale = {"align_scale": (1,)} if self.attn2.aligns else {}
        self.attn2.couple(block.text_exchange, **scale)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        """hidden [N, S, C] -> [N, S, C] with all guidance rows."""
        normed = self.norm1(hidden)
        if call.record_background:
            call.recorded.append(self.attn1.background_kv(normed))
            if self.last:
                # nothing after the last recorded background is ever read
                return hidden
        hidden = self.attn1(normed, hidden, call)
        hidden = self.attn2(self.norm2(hidden), hidden, call)
        gated = self.ops.geglu(self.norm3(hidden), self.ff_in.weight, self.ff_in.bias)
        return self.ops.linear(gated, self.ff_out.weight, self.ff_out.bias, hidden)


class Transformer(nn.Module):
    """GroupNorm and projection around transformer blocks, on the map's positions as tokens."""

    def __init__(self, plan: Plan, channels: int, heads: int, layers: int) -> None:
        super().__init__()
        self.ops = plan.ops
        # of the last product, which adds a residual
        self.out_ops = plan.ops
        self.norm = nn.GroupNorm(plan.config.norm_groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(plan, channels, heads) for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        size = x.shape[-2:]
        tokens = as_tokens(self.norm(x))
        hidden = self.ops.linear(tokens, self.proj_in.weight, self.proj_in.bias)
        for block in self.transformer_blocks:
            hidden = block(hidden, call)
        residual = as_tokens(call.all_rows(x))
        hidden = self.out_ops.linear(hidden, self.proj_out.weight, self.proj_out.bias, residual)
        return as_map(hidden, size)


def as_tokens(x: Tensor) -> Tensor:
    """[N, C, h, w] channels-last -> its view [N, h·w, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_map(tokens: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """[N, h·w, C] -> its view [N, C, h, w], channels-last."""
    return tokens.unflatten(1, tuple(size)).permute(0, 3, 1, 2)


class Level(nn.Module):
    """One resolution, on the way down, in the middle or on the way up.

    A resnet per entry of `inner`, each followed by a transformer where the level has attention; at
    the end a strided convolution (down) or a doubling and a convolution (up).
    """

    def __init__(
        self,
        plan: Plan,
        level: int,
        inner: list[int],
        outer: int,
        attention: bool,
        resample: str | None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        self.attentions = nn.ModuleList()
        for width in inner:
            self.resnets.append(plan.resnet(width, outer))
            if attention:
                self.attentions.append(plan.transformer(outer, level))
        self.resample: Convolution | None = None
        if resample == "down":
            self.resample = Convolution(plan.ops, outer, outer, 3, stride=2, padding=1)
        elif resample == "up":
            self.resample = Upsampling(plan.ops, outer)

    def steps(self) -> Iterator[tuple[ResnetBlock, Transformer | None]]:
        attentions = cast(list[Transformer | None], list(self.attentions))
        resnets = cast(list[ResnetBlock], list(self.resnets))
        return zip(resnets, attentions or [None] * len(resnets), strict=True)

    def down(self, x: Tensor, skips: list[Tensor], call: Call) -> Tensor:
        for resnet, attention in self.steps():
            x = resnet(x, call)
            if attention is not None:
                x = attention(x, call)
            skips.append(x)
        if self.resample is not None:
            x = self.resample(x)
            skips.append(x)
        return x

    def up(self, x: Tensor, skips: list[Tensor], call: Call) -> Tensor:
        for resnet, attention in self.steps():
            skip = call.all_rows(skips.pop())
            x = resnet(torch.cat([call.all_rows(x), skip], dim=1), call)
            if attention is not None:
                x = attention(x, call)
        if isinstance(self.resample, Upsampling):
            x = self.resample.upsample(x, skips[-1].shape[-2:])
        return x


class MiddleLevel(nn.Module):
    """resnet, (transformer, resnet) at the coarsest resolution."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        channels, level = plan.config.channels[-1], len(plan.config.channels) - 1
        self.resnets = nn.ModuleList([plan.resnet(channels, channels)])
        self.attentions = nn.ModuleList([plan.transformer(channels, level)])
        self.resnets.append(plan.resnet(channels, channels))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, call), call)
        return self.resnets[1](x, call)
