"""Nearest doubling and the 3 x 3 convolution after it, as four 2 x 2 convolutions.

These need 4/9 of the products. Of the nine taps on a doubled map several read the same pixel, so
their kernel entries add up to one: for an output's even rows (0, 1 + 2), for its odd rows
(0 + 1, 2), and so for columns. Exact but for the order of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# (row, column) in a doubled pixel
PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """Where an engine folds: measured faster, and in half precision kernels would be rounded anew.

    Measured on CPUs alone.
    """
    return device.type == "cpu" and dtype == torch.float32


def kernels(weight: Tensor) -> list[Tensor]:
    """[D, C, 3, 3] -> four [D, C, 2, 2], in the order of `PLACES`."""
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


def doubled(hidden: Tensor, folded: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """hidden [N, C, h, w] -> [N, D, 2 h, 2 w], in its layout.

    folded: `kernels` of the convolution's weight, which has padding 1.
    """
    count, _, height, width = hidden.shape
    plain = hidden.is_contiguous()
    found = torch.empty(
        (count, folded[0].shape[0], 2 * height, 2 * width),
        dtype=hidden.dtype,
        device=hidden.device,
        memory_format=torch.contiguous_format if plain else torch.channels_last,
    )
    padded = F.pad(hidden, (1, 1, 1, 1))
    for (row, column), kernel in zip(PLACES, folded, strict=True):
        part = padded[:, :, row : row + height + 1, column : column + width + 1]
        found[:, :, row::2, column::2] = F.conv2d(part, kernel, bias)
    return found
