"""The UNet's doublings, folded: the same map, odd sizes as they were, nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dualdiff_engine import Engine
from dualdiff_engine.model.blocks import Upsampling
from dualdiff_engine.ops import bind
from support import DATA


def upsampling(channels: int) -> Upsampling:
    generator = torch.Generator().manual_seed(0)
    made = Upsampling(bind(), channels)
    for parameter in made.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / channels)
    return made


@pytest.mark.parametrize("size", [(10, 14), (9, 14), (10, 13), (9, 13)])
def test_folded_and_unfolded_are_one_map(size: tuple[int, int]) -> None:
    hidden = torch.randn(2, 8, 5, 7, generator=torch.Generator().manual_seed(1))
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    made = upsampling(8)
    before = made.upsample(hidden, torch.Size(size))
    made.fold()
    after = made.upsample(hidden, torch.Size(size))
    grown = F.interpolate(hidden.double(), size=size, mode="nearest")
    exact = F.conv2d(grown, made.weight.double(), made.bias.double(), padding=1)
    # products and sums of 9 C + 1 numbers, the bound of a dot product in fp32
    terms = 9 * 8 + 1
    bound = terms * 2**-24 * (terms * hidden.abs().max() * made.weight.abs().max() + 1)
    assert (after - exact).abs().max() <= bound
    assert after.is_contiguous(memory_format=torch.channels_last)
    # a size that is no doubling is computed as before, to the digit
    assert torch.equal(before, after) is (size != (10, 14))


def test_an_engine_folds_in_fp32_alone() -> None:
    for dtype, folded in (("float32", True), ("bfloat16", False)):
        with Engine.from_pretrained(DATA / "dual/model", dtype=dtype, device="cpu") as engine:
            found = [m for m in engine.unet.modules() if isinstance(m, Upsampling)]
            assert found
            assert [bool(module._folded) for module in found] == [folded] * len(found)
            names = [name for name, _ in engine.unet.named_buffers()]
            assert not [name for name in names if "resample" in name]
            engine.unet.release()
            assert not any(module._folded for module in found)
