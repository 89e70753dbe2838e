"""What a kind of exchange is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Affine:
    """y = W x + b: weight [out, in], bias [out]; for a norm both are [C]."""

    weight: Tensor
    bias: Tensor


class Reader(Protocol):
    """A site's tensors; both raise AdapterError for one that is missing or of another shape."""

    def take(self, name: str, *shape: int | None) -> Tensor: ...

    def affine(self, name: str, *shape: int) -> Affine: ...


class Kind(Protocol):
    """pattern: names of its tensors in a site. zeros: of those, what training starts at zero.

    channels: of a site, as its tensors say. read: a site's tensors as parts; named: the inverse.
    fold: parts in fp64 to buffers, of the shapes of `shapes`. compute: output of a site, [2, M, C]
    of a fresh tensor, and residual, by the site's buffers -> [2, M, C]. layers: trainable modules,
    whose parameters have the names in a file; unfolded: what they make of both branches' outputs
    [2, ..., C], as written in the formula.
    """

    pattern: re.Pattern[str]
    zeros: frozenset[str]

    def channels(self, parts: Reader) -> int: ...

    def read(self, parts: Reader, channels: int) -> Mapping[str, Any]: ...

    def named(self, parts: Mapping[str, Any]) -> dict[str, Tensor]: ...

    def fold(self, parts: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]: ...

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]: ...

    def compute(self, ops: Any, site: Any, out: Tensor, residual: Tensor) -> Tensor: ...

    def layers(self, channels: int) -> dict[str, nn.Module]: ...

    def unfolded(self, layers: Any, branches: Tensor) -> Tensor: ...


def linear(layer: Any, x: Tensor) -> Tensor:
    """A trained fp32 layer on activations of any dtype."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)
