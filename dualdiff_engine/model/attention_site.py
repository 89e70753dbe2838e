"""One attention site: spatial attention, then the exchange between branches, as coupled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.exchanges import NONE, of_kind
from dualdiff_engine.exchanges.kind import Kind
from dualdiff_engine.model.call import Call
from dualdiff_engine.ops import Ops


class AttentionSite(nn.Module):
    """What self and text sites share: the output projection and the exchange.

    Weights are folded by `adapters.fold` and assigned as buffers: another adapter of the same
    coupling is another set of the same tensors. A call with one branch uses the first branch's
    weights and has nobody to exchange with.
    """

    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, ops: Ops, index: int, channels: int, heads: int, branches: int) -> None:
        super().__init__()
        self.ops, self.index, self.channels, self.heads = ops, index, channels, heads
        self.branches = branches
        # of `finish`, whose products have other shapes
        self.out_ops = ops
        self.empty("out_weight", branches, channels, channels)
        self.empty("out_bias", channels)
        self.exchange: Kind = of_kind(NONE)
        self._coupled: dict[str, tuple[int, ...]] = {}

    def empty(self, name: str, *shape: int) -> None:
        self.register_buffer(name, torch.empty(shape, device="meta"))

    def couple(self, exchange: str, **more: tuple[int, ...]) -> None:
        """Exchange by a kind. more: shapes of what else the coupling brings."""
        self.exchange = of_kind(exchange)
        needed = {**self.exchange.shapes(self.channels), **more} if self.branches == 2 else {}
        for name in self._coupled.keys() - needed.keys():
            delattr(self, name)
        for name in needed.keys() - self._coupled.keys():
            self.empty(name, *needed[name])
        self._coupled = needed

    def finish(self, attended: Tensor, residual: Tensor, call: Call) -> Tensor:
        """attended and residual [N, S, C] -> residual + site output."""
        branches = call.branches
        flat = attended.view(branches, -1, self.channels)
        out = self.out_ops.branch_linear(flat, self.out_weight[:branches], self.out_bias)
        if branches == 1:
            return out.view_as(residual).add_(residual)
        shared = residual.reshape(out.shape)
        return self.exchange.compute(self.out_ops, self, out, shared).view_as(residual)


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
        self.connects = False
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
        return self.finish(self._attend(qkv, call), residual, call)

    def _attend(self, qkv: Tensor, call: Call) -> Tensor:
        """qkv [N, S, 3·C] -> [N, S, C]; where branches connect, each reads the keys of both."""
        query, key, value = qkv.chunk(3, dim=-1)
        if not self.connects or call.branches == 1:
            return self.ops.attention(query, key, value, self.heads)
        (key, more_key), (value, more_value) = key.chunk(2), value.chunk(2)
        return self.ops.attention(query, key, value, self.heads, more_key, more_value)

    def background_kv(self, hidden: Tensor) -> Tensor:
        """dK and dV of the image branch: [N, S, C] of the background pass -> [N, S, 2·C]."""
        return self.ops.linear(hidden, self.background_weight, self.background_bias)


class TextSite(AttentionSite):
    """Attention to the prompt. Keys and values are constants of the run, made by `project`.

    Where it aligns, a branch's scores of the placeholder's tokens move to where the other branch
    looks for them.
    """

    q_weight: Tensor
    kv_weight: Tensor
    align_scale: Tensor

    def __init__(
        self, ops: Ops, index: int, channels: int, heads: int, branches: int, context_width: int
    ) -> None:
        super().__init__(ops, index, channels, heads, branches)
        self.aligns = False
        self.empty("q_weight", branches, channels, channels)
        self.empty("kv_weight", branches, 2 * channels, context_width)

    def project(self, context: Tensor, placeholder: Tensor | None = None) -> Tensor:
        """context [F, R, L, X] -> keys and values [F, R, L, 2·C].

        placeholder [F, R, L]: 1 for its tokens. Where the site aligns, their mean key [C] and C
        zeros are one token more, the last.
        """
        kv = self.ops.branch_linear(context, self.kv_weight[: context.shape[0]])
        if not self.aligns or placeholder is None:
            return kv
        # a prompt without the placeholder has a mean key of zeros: it moves no score
        share = placeholder / placeholder.sum(-1, keepdim=True).clamp(min=1)
        mean = (share.unsqueeze(-2).to(kv.dtype) @ kv[..., : self.channels]).squeeze(-2)
        return torch.cat([kv, F.pad(mean, (0, self.channels)).unsqueeze(-2)], dim=-2)

    def forward(self, hidden: Tensor, residual: Tensor, call: Call) -> Tensor:
        """hidden (normed) and residual [N, S, C] -> residual + site output, all rows."""
        flat = hidden.view(call.branches, -1, self.channels)
        query = self.ops.branch_linear(flat, self.q_weight[: call.branches])
        query, residual = call.all_rows(query.view_as(hidden)), call.all_rows(residual)
        kv = call.text[self.index].flatten(0, 1)
        attended = (self._aligned if self.aligns else self._attended)(query, kv, call)
        return self.finish(attended.view_as(query), residual, call)

    def _attended(self, query: Tensor, kv: Tensor, call: Call) -> Tensor:
        # pairs share the prompt, so their positions are one long row of queries
        merged = query.view(call.branches * call.rows, -1, self.channels)
        return self.ops.attention(merged, *kv.chunk(2, dim=-1), self.heads)

    def _aligned(self, query: Tensor, kv: Tensor, call: Call) -> Tensor:
        kv, mean = kv[:, :-1], kv[:, -1, : self.channels]
        if call.branches == 1:
            return self._attended(query, kv, call)
        split = query.view(2, call.rows, call.batch, -1, self.channels)
        key, value = kv.chunk(2, dim=-1)
        return self.ops.align(
            split, key, value, self.heads, mean, call.placeholder, self.align_scale
        )
