"""What one denoiser call holds fixed for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Constants of a denoiser call, each computed once per run and read by position.

    Rows of the batch are branch-major: [branches, rows, batch]. Until the first layer that tells
    the guidance rows apart, the rows of a pair are equal and only one of them is carried.

    time_bias: per resnet, [C_out]. text: per text site, keys and values [branches, rows, L, 2·C].
    background: per self site, the shares of the image branch's keys and values, [rows, S, 2·C].
    record_background: whether this call is the background pass, which fills `recorded` with just
    that, one per self site.
    """

    branches: int
    rows: int
    batch: int
    time_bias: Sequence[Tensor]
    text: Sequence[Tensor]
    background: Sequence[Tensor] | None = None
    record_background: bool = False
    recorded: list[Tensor] = field(default_factory=list)

    def all_rows(self, x: Tensor) -> Tensor:
        """Repeat a row carried for all: [branches·B, ...] -> [branches·rows·B, ...]; else x."""
        if x.shape[0] == self.branches * self.rows * self.batch:
            return x
        split = x.unflatten(0, (self.branches, 1, self.batch))
        return split.expand(-1, self.rows, *split.shape[2:]).flatten(0, 2)
