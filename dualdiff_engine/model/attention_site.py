"""One attention site: spatial attention within each branch, then the exchange between branches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualdiff_engine.model.call import Call
from dualdiff_engine.ops import Ops


class AttentionSite(nn.Module):
    """What self and text sites share: the output projection and the exchange.

    Weights are folded by `adapters.fold` and assigned as buffers: another adapter is
    another set of the same tensors. A call with one branch uses the first branch's weights and has
    nobody to exchange with.
    """

    out_weight: Tensor
    out_bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor

    def __init__(self, ops: Ops, index: int, channels: int, heads: int, branches: int) -> None:
        super().__init__()
        self.ops, self.index, self.channels, self.heads = ops, index, channels, heads
        # of `finish`, whose products have other shapes
        self.out_ops = ops
        self.empty("out_weight", branches, channels, channels)
        self.empty("out_bias", channels)
        if branches == 2:
            for part in ("gate", "value"):
                self.empty(f"{part}_weight", channels, channels)
                self.empty(f"{part}_bias", channels)

    def empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.empty(shape, device="meta"))

    def finish(self, attended: Tensor, residual: Tensor, call: Call) -> Tensor:
        """attended and residual [N, S, C] -> residual + site output."""
        branches = call.branches
        flat = attended.view(branches, -1, self.channels)
        out = self.out_ops.branch_linear(flat, self.out_weight[:branches], self.out_bias)
        if branches == 1:
            return out.view_as(residual).add_(residual)
        return self.out_ops.exchange(
            out,
            self.gate_weight,
            self.gate_bias,
            self.value_weight,
            self.value_bias,
            residual.reshape(out.shape),
        ).view_as(residual)


class SelfSite(AttentionSite):
    """Self-attention; with a background, its keys and values join those of the image branch."""

    qkv_weight: Tensor
    background_keep: Tensor
    background_weight: Tensor
    background_bias: Tensor

    def __init__(
        self, ops: Ops, index: int, channels: int, heads: int, branches: int, background: bool
    ) -> None:
        super().__init__(ops, index, channels, heads, branches)
        self.empty("qkv_weight", branches, 3 * channels, channels)
        if background:
            self.empty("background_keep", 1)
            self.empty("background_weight", 2 * channels, channels)
            self.empty("background_bias", 2 * channels)

    def forward(self, hidden: Tensor, residual: Tensor, call: Call) -> Tensor:
        """hidden (normed) and residual [N, S, C] -> residual + site output [N, S, C]."""
        weight = self.qkv_weight[: call.branches]
        if call.background is None:
            flat = hidden.view(call.branches, -1, self.channels)
            qkv = self.ops.branch_linear(flat, weight)
        else:
            # the background differs between the guidance rows
            hidden, residual = call.all_rows(hidden), call.all_rows(residual)
            flat = hidden.view(call.branches, -1, self.channels)
            background_kv = call.background[self.index]
            qkv = self.ops.branch_linear(flat, weight, None, background_kv, self.background_keep)
        qkv = qkv.view(*hidden.shape[:2], 3 * self.channels)
        attended = self.ops.attention(*qkv.chunk(3, dim=-1), self.heads)
        return self.finish(attended, residual, call)

    def background_kv(self, hidden: Tensor) -> Tensor:
        """dK and dV of the image branch: [N, S, C] of the background pass -> [N, S, 2·C]."""
        return self.ops.linear(hidden, self.background_weight, self.background_bias)


class TextSite(AttentionSite):
    """Attention to the prompt. Keys and values are constants of the run, made by `project`."""

    q_weight: Tensor
    kv_weight: Tensor

    def __init__(
        self, ops: Ops, index: int, channels: int, heads: int, branches: int, context_width: int
    ) -> None:
        super().__init__(ops, index, channels, heads, branches)
        self.empty("q_weight", branches, channels, channels)
        self.empty("kv_weight", branches, 2 * channels, context_width)

    def project(self, context: Tensor) -> Tensor:
        """context [F, R, L, X] -> keys and values [F, R, L, 2·C]."""
        return self.ops.branch_linear(context, self.kv_weight[: context.shape[0]])

    def forward(self, hidden: Tensor, residual: Tensor, call: Call) -> Tensor:
        """hidden (normed) and residual [N, S, C] -> residual + site output, all rows."""
        flat = hidden.view(call.branches, -1, self.channels)
        query = self.ops.branch_linear(flat, self.q_weight[: call.branches])
        query, residual = call.all_rows(query.view_as(hidden)), call.all_rows(residual)
        key, value = call.text[self.index].flatten(0, 1).chunk(2, dim=-1)
        # pairs share the prompt, so their positions are one long row of queries
        merged = query.view(call.branches * call.rows, -1, self.channels)
        attended = self.ops.attention(merged, key, value, self.heads)
        return self.finish(attended.view_as(query), residual, call)
