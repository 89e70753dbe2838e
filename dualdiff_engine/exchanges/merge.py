"""`merge`: each branch moves by what the other one has and it lacks.

Our definition of the merging of Double Helix Diffusion (arXiv 2509.12787), whose authors published
no equations: y_f = x_f + G_f (x̂_g - x̂_f), x̂ a LayerNorm without affine, g the other branch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.exchanges.kind import Reader
from dualdiff_engine.ops.reference import INTERACTION_EPS


class BranchWeight(nn.Module):
    """weight [2, C, C], a matrix per branch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, channels, channels))


class Merge:
    """G_f is row f of `merge.weight` [2, C, C], zero at the start of training."""

    pattern = re.compile(r"merge\.weight")
    zeros = frozenset({"merge.weight"})

    def channels(self, parts: Reader) -> int:
        return parts.take("merge.weight", 2, None, None).shape[1]

    def read(self, parts: Reader, channels: int) -> Mapping[str, Any]:
        return {"merge": parts.take("merge.weight", 2, channels, channels)}

    def named(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"merge.weight": parts["merge"]}

    def fold(self, parts: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        return {"merge_weight": parts["merge"].to(like)}

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        return {"merge_weight": (2, channels, channels)}

    def compute(self, ops: Any, site: Any, out: Tensor, residual: Tensor) -> Tensor:
        merged: Tensor = ops.merge(out, site.merge_weight, residual)
        return merged

    def layers(self, channels: int) -> dict[str, nn.Module]:
        return {"merge": BranchWeight(channels)}

    def unfolded(self, layers: Any, branches: Tensor) -> Tensor:
        normed = F.layer_norm(branches.float(), branches.shape[-1:], eps=INTERACTION_EPS)
        lacked = normed.flip(0) - normed
        weight = layers.merge.weight
        moved = [F.linear(x, w) for x, w in zip(lacked, weight, strict=True)]
        return branches + torch.stack(moved).to(branches.dtype)
