"""`none`: a site's branches do not look at each other."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dualdiff_engine.exchanges.kind import Reader


class Nothing:
    """y_f = residual_f + x_f."""

    pattern = re.compile(r"(?!)")
    zeros: frozenset[str] = frozenset()

    def channels(self, parts: Reader) -> int:
        return parts.take("to_q_lora.0.up.weight", None, None).shape[0]

    def read(self, parts: Reader, channels: int) -> Mapping[str, Any]:
        return {}

    def named(self, parts: Mapping[str, Any]) -> dict[str, Tensor]:
        return {}

    def fold(self, parts: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
        return {}

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        return {}

    def compute(self, ops: Any, site: Any, out: Tensor, residual: Tensor) -> Tensor:
        return out.add_(residual)

    def layers(self, channels: int) -> dict[str, nn.Module]:
        return {}

    def unfolded(self, layers: Any, branches: Tensor) -> Tensor:
        return branches
