"""Nearest doubling and the 3 x 3 convolution after it, as four 2 x 2 convolutions.

These need 4/9 of the products. Of the nine taps on a doubled map several read the same pixel, so
their kernel entries add up to one: for an output's even rows (0, 1 + 2), for its odd rows
(0 + 1, 2), and so for columns. Exact but for the order of the sums. Measured by
`python -m dualdiff_engine.bench.vae_decode`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        for name, kernel in zip(_NAMES, kernels(conv.weight), strict=True):
            self.register_buffer(name, kernel, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [N, C, h, w] -> [N, D, 2 h, 2 w], in its layout."""
        if torch.compiler.is_exporting():
            # runtimes know this form, and write strided slices slowly
            return self.conv(F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        count, _, height, width = hidden.shape
        plain = hidden.is_contiguous()
        doubled = torch.empty(
            (count, self.conv.out_channels, 2 * height, 2 * width),
            dtype=hidden.dtype,
            device=hidden.device,
            memory_format=torch.contiguous_format if plain else torch.channels_last,
        )
        padded = F.pad(hidden, (1, 1, 1, 1))
        for name, (row, column) in _NAMES.items():
            part = padded[:, :, row : row + height + 1, column : column + width + 1]
            doubled[:, :, row::2, column::2] = F.conv2d(part, getattr(self, name), self.conv.bias)
        return doubled


# buffer -> (row, column) in a doubled pixel
_NAMES = {f"kernel_{row}{column}": (row, column) for row in (0, 1) for column in (0, 1)}


def kernels(weight: Tensor) -> list[Tensor]:
    """[D, C, 3, 3] -> four [D, C, 2, 2], in the order of (row, column) in a doubled pixel."""
    return [
        column.to(weight.dtype).contiguous()
        for row in _halves(weight.detach().double(), 2)
        for column in _halves(row, 3)
    ]


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The taps of the even and of the odd outputs, three along `dim` made two."""
    first, middle, last = weight.unbind(dim)
    even = torch.stack((first, middle + last), dim)
    return even, torch.stack((first + middle, last), dim)
