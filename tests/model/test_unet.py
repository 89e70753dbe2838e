"""Uncoupled and with one branch, DualUNet is diffusers' UNet2DConditionModel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dualdiff_engine.adapters import fold
from dualdiff_engine.errors import BaseModelError
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import bind
from support import relative

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"norm_num_groups": 8, "cross_attention_dim": 24, "attention_head_dim": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {**SMALL, "block_out_channels": (16, 32, 48, 48)},
    "sd2": {
        **SMALL,
        "block_out_channels": (16, 32, 64, 64),
        "attention_head_dim": [2, 4, 8, 8],
        "use_linear_projection": True,
    },
    "three-levels": {
        **SMALL,
        "block_out_channels": (16, 24, 48),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
    },
    "deep-transformers": {
        **SMALL,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": 2,
        "layers_per_block": [1, 2],
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}


def diffusers_unet(name: str) -> Any:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**CONFIGS[name])
    for norm in (m for m in unet.modules() if isinstance(m, torch.nn.GroupNorm)):
        torch.nn.init.normal_(norm.weight, 1, 0.2)
        torch.nn.init.normal_(norm.bias, 0, 0.2)
    return unet.eval()


def plain_engine(unet: Any) -> DualUNet:
    config = UNetConfig.from_dict({**unet.config, "_class_name": "UNet2DConditionModel"})
    network = DualUNet(config, bind("reference"), branches=1)
    network.load(fold.fold_network(unet.state_dict(), CPU, torch.float32))
    network.load(fold.fold_sites(unet.state_dict(), None, CPU, torch.float32))
    return network


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(16, 16), (24, 8), (13, 9)])
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    unet = diffusers_unet(name)
    network = plain_engine(unet)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(3, 4, *size, generator=generator)
    context = torch.randn(3, 7, 24, generator=generator)
    expected = unet(latents, torch.tensor(481), context).sample
    # every sample has a text of its own: they are this call's guidance rows
    noise = network(
        latents[None, :, None],
        network.time_inputs(torch.tensor([481]))[0],
        network.text_inputs(context[None]),
    )
    assert relative(noise[0, :, 0], expected) <= 2e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_shared_latents_are_computed_once(name: str) -> None:
    network = plain_engine(diffusers_unet(name))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 1, 2, 4, 16, 16, generator=generator)
    bias = network.time_inputs(torch.tensor([481]))[0]
    text = network.text_inputs(torch.randn(1, 2, 7, 24, generator=generator))
    rows: list[int] = []
    network.conv_in.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
    shared = network(latents, bias, text)
    repeated = network(latents.expand(-1, 2, -1, -1, -1, -1), bias, text)
    assert rows == [2, 4]
    assert shared.shape == repeated.shape == (1, 2, 2, 4, 16, 16)
    assert relative(shared, repeated) <= 1e-6


def coupled(
    background: bool, backend: str = "reference", name: str = "sd1"
) -> tuple[DualUNet, Tensor, Any, Any]:
    from dualdiff_engine.bench.step.case import RandomWeights, random_adapter

    unet = diffusers_unet(name)
    base = RandomWeights({n: tuple(t.shape) for n, t in unet.state_dict().items()}, seed=3)
    adapter = random_adapter(base, background=background, rank=4)
    config = UNetConfig.from_dict(unet.config)
    network = DualUNet(config, bind(backend), background=background)
    network.load(fold.fold_network(base, CPU, torch.float32))
    network.load(fold.fold_sites(base, adapter.sites, CPU, torch.float32))
    latents = torch.randn(2, 1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = network.text_inputs(base_context())
    return network, latents, network.time_inputs(torch.tensor([481]))[0], text


def base_context() -> Tensor:
    return torch.randn(2, 2, 7, 24, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("background", [False, True])
def test_a_pair_does_not_depend_on_its_batch(background: bool) -> None:
    network, latents, bias, text = coupled(background)
    shares = None
    if background:
        noised = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        shares = network.background_shares(noised, bias, text)
        assert [s.shape[0] for s in shares] == [2] * len(network.transformer_blocks)
    together = network(latents, bias, text, shares)
    alone = torch.cat(
        [network(latents[:, :, i : i + 1], bias, text, shares) for i in range(3)], dim=2
    )
    assert relative(together, alone) <= 1e-6


def test_branches_are_coupled() -> None:
    network, latents, bias, text = coupled(False)
    noise = network(latents, bias, text)
    changed = latents.clone()
    changed[1] += 1
    # the image branch's latents are as they were, its noise is not
    assert relative(network(changed, bias, text)[0], noise[0]) > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"addition_embed_type": "text_time"},
            "addition_embed_type = 'text_time' is not an SD-1.x",
        ),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "block types"),
        ({"up_block_types": ["UpBlock2D"]}, "block types"),
        ({"layers_per_block": [2]}, "layers_per_block = .2. does not give 4"),
        ({"attention_head_dim": "8"}, "attention_head_dim"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"block_out_channels": None}, "block_out_channels = None is not a list"),
    ],
)
def test_other_families_are_refused(change: dict[str, Any], message: str) -> None:
    config = {**UNet2DConditionModel(**CONFIGS["sd1"]).config, **change}
    with pytest.raises(BaseModelError, match=message):
        UNetConfig.from_dict(config)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torch_compile_takes_the_network_in_one_graph(backend: str) -> None:
    unet, *arguments = coupled(False, backend, "deep-transformers")
    exact = unet(*arguments)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), exact)
