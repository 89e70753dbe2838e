"""A small U-Net (Ronneberger et al. 2015) that marks defects pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

WIDTHS = (8, 16, 32, 64, 96)


class UNet(nn.Module):
    """[B, 3, H, W] float32 in [0, 1] -> logits [B, H, W]; H and W multiples of `multiple`.

    widths: channels per level, each at half the size of the one before.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.multiple = 2 ** (len(widths) - 1)
        inputs = (3, *widths[:-1])
        self.down = nn.ModuleList(map(_block, inputs, widths))
        pairs = list(pairwise(widths))
        self.up = nn.ModuleList(_block(fine + coarse, fine) for fine, coarse in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 1, 1)
        # defects are rare: starting at one pixel in twenty saves the first steps
        assert self.head.bias is not None
        nn.init.constant_(self.head.bias, -3.0)

    def forward(self, pictures: Tensor) -> Tensor:
        hidden = pictures * 4 - 2
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level:
                kept.append(hidden)
                hidden = nn.functional.max_pool2d(hidden, 2)
            hidden = block(hidden)
        for block in self.up:
            hidden = nn.functional.interpolate(hidden, scale_factor=2)
            hidden = block(torch.cat([kept.pop(), hidden], dim=1))
        return self.head(hidden).squeeze(1)


def _block(inputs: int, outputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        convolution = nn.Conv2d(width, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
