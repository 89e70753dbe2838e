"""The network as a careful port to diffusers has it: merged LoRA, all pairs in one batch.

What the engine's folds and kernels are measured against. The interaction keeps its ten products,
text is projected in every layer of every step. Rows are branch-major: [branches, rows, pairs].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.adapters.format import Adapter, SiteAdapter
from dualdiff_engine.bench.step.released import ReleasedSite, ReleasedUNet, affine

# query, key, value [N, S, H, D] -> [N, S, H, D]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


class PortedSite(ReleasedSite):
    """merged: per branch the weights q, k, v, out; site in the dtype of the network."""

    def __init__(
        self, site: SiteAdapter, name: str, merged: list[dict[str, Tensor]], attend: Attend
    ) -> None:
        super().__init__(site, name)
        self.merged, self.attend = merged, attend

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        if self.writing:
            if encoder_hidden_states is None:
                self.background = hidden
            return self._attend(attn, 0, hidden, encoder_hidden_states)
        rows = hidden.chunk(2)
        contexts: tuple[Tensor | None, ...] = (None, None)
        if encoder_hidden_states is not None:
            contexts = encoder_hidden_states.chunk(2)
        elif self.background is not None:
            contexts = (self._blend(rows[0]), None)
        branches = [self._attend(attn, f, rows[f], contexts[f]) for f in (0, 1)]
        mixed = self._interact(torch.stack(branches, dim=1))
        return mixed.transpose(0, 1).flatten(0, 1)

    def _attend(self, attn: Any, branch: int, hidden: Tensor, context: Tensor | None) -> Tensor:
        weight, context = self.merged[branch], hidden if context is None else context
        query, key, value = (
            F.linear(x, weight[part]).unflatten(-1, (attn.heads, -1))
            for part, x in (("q", hidden), ("k", context), ("v", context))
        )
        out = self.attend(query, key, value).flatten(2)
        return F.linear(out, weight["out"], attn.to_out[0].bias)

    def _blend(self, hidden: Tensor) -> Tensor:
        """hidden [R·B, S, C]; the background [R, S, C] is that of all pairs."""
        blend = self.site.background
        assert blend is not None
        assert self.background is not None
        learnt = affine(affine(self.background, blend.reduce), blend.expand)
        own = hidden.unflatten(0, (learnt.shape[0], -1))
        return ((1 - blend.amount) * own + blend.amount * learnt[:, None]).flatten(0, 1)


def merged(
    base: Mapping[str, Tensor], adapter: Adapter, like: Tensor
) -> dict[str, list[dict[str, Tensor]]]:
    """By site and branch W + up @ down, added in fp32 and kept as `like`, where the adapter is."""
    suffixes = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    found: dict[str, list[dict[str, Tensor]]] = {}
    for name, site in adapter.sites.items():
        own = {p: base[f"{name}.{s}.weight"].to(like.device) for p, s in suffixes.items()}
        found[name] = [
            {p: torch.addmm(w, branch[p].up, branch[p].down).to(like) for p, w in own.items()}
            for branch in site.lora
        ]
    return found


class PortedUNet(ReleasedUNet):
    """A diffusers UNet with ported sites.

    merged: as from the function; adapter: the same, in the unet's dtype and on its device. Called
    with latents [2·R·B, 4, h, w] and context [2·R·B, L, X]; returns noise [2·R·B, 4, h, w].
    """

    def __init__(
        self,
        unet: Any,
        adapter: Adapter,
        merged: Mapping[str, list[dict[str, Tensor]]],
        attend: Attend = sdpa,
    ) -> None:
        self.unet = unet
        self.sites = {
            name: PortedSite(site, name, merged[name], attend)
            for name, site in adapter.sites.items()
        }
        unet.set_attn_processor({f"{n}.processor": site for n, site in self.sites.items()})
