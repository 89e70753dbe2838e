"""DualUNet: the coupled two-branch denoiser, top-down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dualdiff_engine.errors import BackendError
from dualdiff_engine.model.blocks import (
    Convolution,
    Level,
    MiddleLevel,
    Plan,
    TransformerBlock,
    Upsampling,
    norm_silu,
)
from dualdiff_engine.model.call import Call
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.coupling import Coupling
from dualdiff_engine.ops import Ops


class DualUNet(nn.Module):
    """An SD UNet run as coupled branches over one batch, branch-major and channels-last.

    Built empty on the meta device; `dualdiff_engine.adapters.fold` folds what `load` assigns. With
    `branches=1` it is the plain UNet.
    """

    def __init__(
        self, config: UNetConfig, ops: Ops, *, branches: int = 2, background: bool = False
    ) -> None:
        super().__init__()
        self.config, self.ops, self.branches = config, ops, branches
        plan = Plan(config, ops, branches, background)
        channels = config.channels
        with torch.device("meta"):
            self.time_linear_1 = nn.Linear(channels[0], config.time_width)
            self.time_linear_2 = nn.Linear(config.time_width, config.time_width)
            self.conv_in = Convolution(ops, config.in_channels, channels[0], 3, padding=1)
            skips = self._build_down(plan)
            self.middle = MiddleLevel(plan)
            self._build_up(plan, skips)
            self.norm_out = nn.GroupNorm(config.norm_groups, channels[0], config.norm_eps)
            self.conv_out = Convolution(ops, channels[0], config.out_channels, 3, padding=1)
            # every resnet's time projection, stacked, with the bias of the conv it joins
            self.time_table = nn.Linear(config.time_width, sum(plan.time_widths))
        self.time_widths = plan.time_widths
        self.coupling: Coupling | None = None
        self.couple(None)
        self.transformer_blocks[-1].last = True
        self.eval().requires_grad_(False)

    def _build_down(self, plan: Plan) -> list[int]:
        config = self.config
        skips, inner = [config.channels[0]], config.channels[0]
        self.down_levels = nn.ModuleList()
        for level, outer in enumerate(config.channels):
            deepest = level == len(config.channels) - 1
            widths = [inner] + [outer] * (config.layers[level] - 1)
            resample = None if deepest else "down"
            self.down_levels.append(
                Level(plan, level, widths, outer, config.down_attention[level], resample)
            )
            skips += [outer] * (config.layers[level] + (not deepest))
            inner = outer
        return skips

    def _build_up(self, plan: Plan, skips: list[int]) -> None:
        config = self.config
        self.up_levels = nn.ModuleList()
        inner = config.channels[-1]
        for position, level in enumerate(reversed(range(len(config.channels)))):
            outer = config.channels[level]
            widths = []
            for _ in range(config.layers[level] + 1):
                widths.append(inner + skips.pop())
                inner = outer
            resample = "up" if level > 0 else None
            self.up_levels.append(
                Level(plan, level, widths, outer, config.up_attention[position], resample)
            )

    @property
    def transformer_blocks(self) -> list[TransformerBlock]:
        """In order of execution: the position of each is its sites' index."""
        levels = [*self.down_levels, self.middle, *self.up_levels]
        return [block for x in levels for a in x.attentions for block in a.transformer_blocks]

    def couple(self, coupling: Coupling | None) -> None:
        """Couple the branches otherwise; None: as DualAnoDiff does. Sites lose what they lack.

        What `load` brings next has the coupling's names. Raises BackendError for a coupling of
        another number of blocks.
        """
        blocks = self.transformer_blocks
        chosen = coupling or Coupling.released(len(blocks))
        if len(chosen.blocks) != len(blocks):
            raise BackendError(
                f"the adapter couples {len(chosen.blocks)} blocks, the base model has "
                f"{len(blocks)}: load the base that it was trained on"
            )
        for module, block in zip(blocks, chosen.blocks, strict=True):
            module.couple(block)
        self.coupling = coupling

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Point parameters and buffers at `tensors`; names not given keep what they have."""
        wrong = self.load_state_dict(dict(tensors), strict=False, assign=True).unexpected_keys
        if wrong:
            raise KeyError(f"not part of the network: {wrong[:3]}")

    def fold_doublings(self) -> None:
        """Compute doublings with 4/9 of the products, by the weights as they are now."""
        for upsampling in self._upsamplings:
            upsampling.fold()

    @property
    def _upsamplings(self) -> list[Upsampling]:
        return [module for module in self.modules() if isinstance(module, Upsampling)]

    def missing(self) -> list[str]:
        """Parameters not loaded yet; what adapters bring, the buffers, aside."""
        return [name for name, parameter in self.named_parameters() if parameter.is_meta]

    def release(self) -> None:
        """Drop every weight; the network cannot run any more."""
        for upsampling in self._upsamplings:
            upsampling.release()
        self.to("meta")

    def time_inputs(self, timesteps: Tensor) -> list[Sequence[Tensor]]:
        """For every timestep [T], the bias of each resnet's first convolution, [C_out]."""
        return self.embedded_bias(timesteps, frequencies(self.config, timesteps.device))

    def embedded_bias(self, timesteps: Tensor, frequencies: Tensor) -> list[Sequence[Tensor]]:
        """As `time_inputs`, with the `frequencies` of the embedding given."""
        embedding = timestep_embedding(timesteps, frequencies, self.config.flip_sin_to_cos)
        embedding = embedding.to(self.time_table.weight.dtype)
        linear, silu = self.ops.linear, nn.functional.silu
        hidden = silu(linear(embedding, self.time_linear_1.weight, self.time_linear_1.bias))
        hidden = silu(linear(hidden, self.time_linear_2.weight, self.time_linear_2.bias))
        table = linear(hidden, self.time_table.weight, self.time_table.bias)
        return [row.split(self.time_widths) for row in table]

    def text_inputs(self, context: Tensor, placeholder: Tensor | None = None) -> list[Tensor]:
        """context [F, R, L, X] -> keys and values of every text site, [F, R, L, 2·C].

        placeholder [F, R, L]: see `Denoiser.text_inputs`. With a coupling that aligns the last
        tensor says which tokens it moves.
        """
        blocks = self.transformer_blocks
        if self.coupling is None or not self.coupling.aligns or self.branches == 1:
            return [block.attn2.project(context) for block in blocks]
        if placeholder is None:
            placeholder = torch.zeros(context.shape[:3], device=context.device)
        context, placeholder, places = _placeholder_last(context, placeholder.to(context.device))
        return [*(b.attn2.project(context, placeholder) for b in blocks), places]

    def background_shares(
        self, latents: Tensor, time_bias: Sequence[Tensor], text: Sequence[Tensor]
    ) -> list[Tensor]:
        """The background pass: the first branch alone, without exchange.

        latents [R, 4, h, w], noised to the timestep, or [R·B, 4, h, w] of B backgrounds; text as
        from `text_inputs`, of which the first branch is used -> per self site, shares of its keys
        and values [R, S, 2·C] or [R·B, S, 2·C].
        """
        rows = text[0].shape[1]
        each = latents.shape[0] // rows
        call = Call(1, rows, each, time_bias, [kv[:1] for kv in text], record_background=True)
        self._run(latents, call)
        return call.recorded

    def forward(
        self,
        latents: Tensor,
        time_bias: Sequence[Tensor],
        text: Sequence[Tensor],
        background: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise.

        latents [F, R or 1, B, 4, h, w]: with 1 the guidance rows share their latents, and what is
        equal in both is computed once. Returns [F, R, B, 4, h, w] in the network's dtype.
        """
        branches, _, batch = latents.shape[:3]
        rows = text[0].shape[1]
        call = Call(branches, rows, batch, time_bias, text, background)
        noise = self._run(latents.flatten(0, 2), call)
        return noise.unflatten(0, (branches, rows, batch))

    def _run(self, latents: Tensor, call: Call) -> Tensor:
        x = latents.to(self.conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x)
        skips = [x]
        for level in cast(list[Level], self.down_levels):
            x = level.down(x, skips, call)
        x = self.middle(x, call)
        for level in cast(list[Level], self.up_levels):
            x = level.up(x, skips, call)
        return self.conv_out(norm_silu(self.ops, self.norm_out, x)).contiguous()


def _placeholder_last(context: Tensor, placeholder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same tokens with the placeholder's last, in every prompt, and 1 for those places [L].

    Attention does not depend on the order of its keys: so one list of places serves all prompts.
    """
    order = placeholder.argsort(dim=-1, stable=True)
    moved = placeholder.gather(-1, order)
    context = context.gather(-2, order.unsqueeze(-1).expand_as(context))
    return context, moved, moved.flatten(0, -2).amax(0).to(context.dtype)


def frequencies(config: UNetConfig, device: torch.device | str) -> Tensor:
    """Of the timestep's sinusoids, [C / 2] in fp32 (DDPM, appendix B)."""
    half = config.channels[0] // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent / (half - config.freq_shift))


def timestep_embedding(timesteps: Tensor, frequencies: Tensor, flip_sin_to_cos: bool) -> Tensor:
    """Sinusoids [T, C] of timesteps [T], in fp32 as the base models were trained with."""
    angles = timesteps.float()[:, None] * frequencies[None]
    parts = [torch.cos(angles), torch.sin(angles)]
    return torch.cat(parts if flip_sin_to_cos else parts[::-1], dim=-1)
