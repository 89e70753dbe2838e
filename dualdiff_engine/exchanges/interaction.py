"""`interaction`: at every position a branch looks at itself and at its partner (DualAnoDiff)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.exchanges.kind import Affine, Reader, linear
from dualdiff_engine.ops.reference import INTERACTION_EPS

# the released names of its parts, and ours
PARTS = {"n": "norm", "i": "input", "q": "query", "k": "key", "v": "value", "o": "output"}


class Interaction:
    """Self-attention over two tokens, the branches, behind a LayerNorm and an input layer.

    https://arxiv.org/abs/2408.13509; folded as in the docstring of `ops.reference.exchange`.
    """

    pattern = re.compile(r"temporal_[niqkvo]\.(weight|bias)")
    # the output layer: training starts at the base model
    zeros = frozenset({"temporal_o.weight"})

    def channels(self, parts: Reader) -> int:
        return parts.take("temporal_n.weight", None).shape[0]

    def read(self, parts: Reader, channels: int) -> Mapping[str, Any]:
        return {
            ours: parts.affine(f"temporal_{theirs}", *([channels] * (1 if theirs == "n" else 2)))
            for theirs, ours in PARTS.items()
        }

    def named(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        named: dict[str, Tensor] = {}
        for theirs, ours in PARTS.items():
            named[f"temporal_{theirs}.weight"] = parts[ours].weight
            named[f"temporal_{theirs}.bias"] = parts[ours].bias
        return named

    def fold(self, parts: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        return fold_interaction(parts, like)

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        square, line = (channels, channels), (channels,)
        return {
            "gate_weight": square,
            "gate_bias": line,
            "value_weight": square,
            "value_bias": line,
        }

    def compute(self, ops: Any, site: Any, out: Tensor, residual: Tensor) -> Tensor:
        exchanged: Tensor = ops.exchange(
            out, site.gate_weight, site.gate_bias, site.value_weight, site.value_bias, residual
        )
        return exchanged

    def layers(self, channels: int) -> dict[str, nn.Module]:
        layers: dict[str, nn.Module] = {"temporal_n": nn.LayerNorm(channels, INTERACTION_EPS)}
        return layers | {f"temporal_{part}": nn.Linear(channels, channels) for part in "iqkvo"}

    def unfolded(self, layers: Any, branches: Tensor) -> Tensor:
        """A softmax over two keys is the sigmoid of the difference of their scores."""
        channels, norm = branches.shape[-1], layers.temporal_n
        normed = F.layer_norm(branches.float(), (channels,), norm.weight, norm.bias, norm.eps)
        entry = linear(layers.temporal_i, normed.to(branches.dtype))
        query, key, value = (
            linear(layer, entry)
            for layer in (layers.temporal_q, layers.temporal_k, layers.temporal_v)
        )
        scores = (query * (key[0] - key[1])).float().sum(-1, keepdim=True) / math.sqrt(channels)
        mixed = value[1] + torch.sigmoid(scores).to(branches.dtype) * (value[0] - value[1])
        return branches + linear(layers.temporal_o, mixed)


def fold_interaction(parts: Mapping[str, Affine], like: Tensor) -> dict[str, Tensor]:
    """Ten products per position pair -> three (proof in the docstring of `ops.reference.exchange`).

    With g, b the affine part of the LayerNorm and W_i n + b_i what q, k, v read:
    M = diag(g) (W_q W_i)^T (W_k W_i) diag(g) / sqrt(C), m = diag(g) (W_k W_i)^T q_0 / sqrt(C),
    V = W_x W_v W_i diag(g), v = W_x v_0 + b_x, where q_0 and v_0 are the query and the value of the
    LayerNorm's bias. What both keys share cancels in a softmax over two.
    """
    part = {
        name: Affine(affine.weight.to(like), affine.bias.to(like)) for name, affine in parts.items()
    }
    norm, entry = part["norm"], part["input"]
    constant = entry.weight @ norm.bias + entry.bias
    query = part["query"].weight @ entry.weight * norm.weight
    key = part["key"].weight @ entry.weight * norm.weight
    value = part["output"].weight @ part["value"].weight
    query_constant = part["query"].weight @ constant + part["query"].bias
    value_constant = part["value"].weight @ constant + part["value"].bias
    scale = 1 / math.sqrt(norm.weight.shape[0])
    return {
        "gate_weight": scale * (query.T @ key),
        "gate_bias": scale * (key.T @ query_constant),
        "value_weight": value @ entry.weight * norm.weight,
        "value_bias": part["output"].weight @ value_constant + part["output"].bias,
    }
