"""The doublings of a VAE's decoder, folded; see `dualdiff_engine.model.doubling`.

Measured by `python -m dualdiff_engine.bench.vae_decode`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualdiff_engine.model.doubling import PLACES, doubled, kernels


def fold(vae: Any) -> None:
    """Fold the doublings of a decoder in place.

    vae: diffusers' AutoencoderKL with fp32 weights on a CPU. In half precision the added kernel
    entries would be rounded anew, and on a GPU nobody has measured that it gains: not for those.
    """
    for level in vae.decoder.up_blocks:
        for number, step in enumerate(level.upsamplers or ()):
            level.upsamplers[number] = Doubling(step.conv)


class Doubling(nn.Module):
    """Doubles a map's sides and convolves it.

    conv: the 3 x 3 convolution with padding 1. It stays a member under its name: checkpoints and
    exports read it there. Weights that change later are not seen.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._names = [f"kernel_{row}{column}" for row, column in PLACES]
        for name, kernel in zip(self._names, kernels(conv.weight), strict=True):
            self.register_buffer(name, kernel, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, C, h, w] -> [N, D, 2 h, 2 w], in its layout."""
        if torch.compiler.is_exporting():
            # runtimes know this form, and write strided slices slowly
            return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return doubled(hidden, [getattr(self, name) for name in self._names], self.conv.bias)
