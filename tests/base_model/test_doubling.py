"""Doubling and convolution folded into one: the same map, the same decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.base_model.doubling import Doubling
from support import DATA

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 1, 2), (2, 8, 5, 7), (1, 16, 8, 4)])
def test_equals_the_two_steps(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(shape, generator=generator).to(memory_format=layout)
    conv = torch.nn.Conv2d(shape[1], 5, 3, padding=1)
    with torch.inference_mode():
        got = Doubling(conv)(hidden)
        exact = conv.double()(F.interpolate(hidden.double(), scale_factor=2.0, mode="nearest"))
    # products and sums of 9 C + 1 numbers, the bound of a dot product in fp32
    terms = 9 * shape[1] + 1
    bound = terms * 2**-24 * (9 * shape[1] * hidden.abs().max() * conv.weight.abs().max() + 1)
    assert got.is_contiguous(memory_format=layout)
    assert (got - exact).abs().max() <= bound


def test_every_doubling_of_a_decoder_is_folded_and_its_tensors_keep_their_names() -> None:
    base = BaseModel(DATA / "dual/model")
    folded = base.load_vae(CPU, torch.float32)
    plain = base.load_vae(CPU, torch.bfloat16)
    found = [x for x in folded.decoder.modules() if isinstance(x, Doubling)]
    assert len(found) == len(folded.config.block_out_channels) - 1
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert not [x for x in plain.modules() if isinstance(x, Doubling)]


def test_a_decoder_draws_the_same_picture() -> None:
    from diffusers import AutoencoderKL

    folder: Path = DATA / "dual/model/vae"
    theirs = AutoencoderKL.from_pretrained(folder).eval()
    ours = BaseModel(DATA / "dual/model").load_vae(CPU, torch.float32)
    latents = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got, want = ours.decode(latents).sample, theirs.decode(latents).sample
        exact = theirs.double().decode(latents.double()).sample
    # as near to the exact picture as diffusers' own, but for what chance moves
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
