"""A denoiser call: what runs one, and what it holds fixed for every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from dualdiff_engine.model.coupling import Coupling


class Denoiser(Protocol):
    """What predicts noise: the network, its CUDA graphs, or an exported graph in a runtime.

    What a denoiser makes of timesteps and prompts is its own: callers make it once per run and hand
    it back in every call.
    """

    def time_inputs(self, timesteps: Tensor, /) -> list[Sequence[Tensor]]:
        """For every timestep [T], what a call at it needs."""
        ...

    def text_inputs(self, context: Tensor, placeholder: Tensor | None = None, /) -> list[Tensor]:
        """Prompt embeddings [2 branches, R, L, X] -> what a call needs of them.

        placeholder [2, R, L]: 1 for the tokens that an adapter's coupling aligns, where it does.
        """
        ...

    def background_shares(
        self, latents: Tensor, time: Sequence[Tensor], text: Sequence[Tensor], /
    ) -> list[Tensor]:
        """The background pass; latents [R, 4, h, w], noised -> what a call needs of them.

        Or [R·B, 4, h, w]: a background for each of B pairs.
        """
        ...

    def __call__(
        self,
        latents: Tensor,
        time: Sequence[Tensor],
        text: Sequence[Tensor],
        background: Sequence[Tensor] | None = None,
        /,
    ) -> Tensor:
        """Predict the noise [2, R, B, 4, h, w] of latents [2, R or 1, B, 4, h, w]."""
        ...

    def couple(self, coupling: Coupling | None, /) -> None:
        """Couple the branches as the adapter does that is loaded next; None: as DualAnoDiff does.

        Raises BackendError where that cannot be.
        """
        ...

    def load(self, tensors: Mapping[str, Tensor], /) -> None:
        """Take the folded tensors of another adapter."""
        ...

    def release(self) -> None:
        """Drop every weight; the denoiser is not called again."""
        ...


@dataclass(frozen=True)
class Call:
    """Constants of a denoiser call, each computed once per run and read by position.

    Rows of the batch are branch-major: [branches, rows, batch]. Until the first layer that tells
    the guidance rows apart, the rows of a pair are equal and only one of them is carried.

    time_bias: per resnet, [C_out]. text: per text site, keys and values [branches, rows, L, 2·C],
    or as `TextSite.project` makes them where it aligns; then the last is `placeholder` [L].
    background: per self site, the shares of the image branch's keys and values, [rows, S, 2·C], or
    [rows·batch, S, 2·C] where pairs have backgrounds of their own.
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

    @property
    def placeholder(self) -> Tensor:
        """1 for tokens [L] of the placeholder, 0 for others: the same places in every prompt."""
        return self.text[-1]

    def all_rows(self, x: Tensor) -> Tensor:
        """Repeat a row carried for all: [branches·B, ...] -> [branches·rows·B, ...]; else x."""
        if x.shape[0] == self.branches * self.rows * self.batch:
            return x
        split = x.unflatten(0, (self.branches, 1, self.batch))
        return split.expand(-1, self.rows, *split.shape[2:]).flatten(0, 2)
