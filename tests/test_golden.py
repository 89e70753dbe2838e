"""The released program's outputs, reproduced through the public API."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dualdiff_engine import Engine
from dualdiff_engine.bench.step.released import ReleasedUNet
from dualdiff_engine.ops import serves
from support import Golden, by_branch, denoiser_call, golden_engine, relative

# fp32 rounding through some sixty layers; an independent fp32 implementation reaches 8e-7
FP32 = 2e-6


@pytest.mark.parametrize("backend", ["reference", "onednn", "native"])
def test_noise_and_every_layer(golden: Golden, backend: str) -> None:
    ok, reason = serves("native", "attention", torch.device("cpu"), torch.float32)
    if backend == "native" and not ok:
        pytest.skip(reason)
    engine = golden_engine(golden.name, backend=backend)
    noise, layers = denoiser_call(engine, golden)
    assert relative(noise, by_branch(golden.denoiser["noise_pred"])) <= FP32
    expected = {k.removeprefix("layer."): v for k, v in golden.denoiser.items() if "layer." in k}
    assert set(layers) == set(expected)
    for name, value in expected.items():
        assert relative(layers[name], by_branch(value)) <= FP32, name


def test_prompt_embeddings(golden: Golden, engine_of: Any) -> None:
    image, anomaly = engine_of(golden.name).encode_prompts()
    assert relative(image, golden.pipeline["prompt_embeds_blend"]) <= FP32
    assert relative(anomaly, golden.pipeline["prompt_embeds_fg"]) <= FP32


def run_pipeline(engine: Engine, golden: Golden, **options: Any) -> tuple[list[Tensor], Tensor]:
    """(latents after every denoiser call, decoded pictures), in released row order."""
    p = golden.pipeline
    steps: list[Tensor] = []

    def keep(engine: Engine, step: int, timestep: Tensor, inputs: dict[str, Tensor]) -> Any:
        assert step == len(steps)
        steps.append(inputs["latents"].flatten(0, 1).clone())
        return inputs

    if golden.background:
        options["background_latents"] = p["background_latent"]
        options["background_noise"] = p["background_noise_per_step"]
    pairs = engine.generate(
        latents=p["latents_in"].unflatten(0, (-1, 2)),
        steps=golden.settings["steps"],
        guidance=golden.settings["guidance_scale"],
        output_type="pt",
        callback_on_step_end=keep,
        **options,
    )
    return steps, torch.stack([picture for pair in pairs for picture in (pair.image, pair.anomaly)])


def test_pipeline(golden: Golden, engine_of: Any) -> None:
    steps, pictures = run_pipeline(engine_of(golden.name), golden)
    expected = golden.pipeline["per_step_latents"]
    # PNDM calls the denoiser once more than it has steps, and the golden file starts after that
    assert len(steps) == len(expected) + 1
    for step, value in zip(steps[1:], expected, strict=True):
        assert relative(step, value) <= 1e-5
    assert float((pictures - golden.pipeline["image"]).abs().max()) <= 1e-4


def test_bf16_loses_no_more_than_unfolded_bf16(
    golden: Golden, engine_of: Any, record_property: Any
) -> None:
    engine = engine_of(golden.name, "bfloat16")
    noise, _ = denoiser_call(engine, golden)
    expected = by_branch(golden.denoiser["noise_pred"])
    folded = relative(noise, expected)
    unfolded = relative(by_branch(unfolded_noise(golden, torch.bfloat16)), expected)
    record_property("bf16_error", folded)
    record_property("bf16_budget_used", folded / unfolded)
    assert folded <= unfolded


def test_unfolded_peer_is_the_released_computation(golden: Golden) -> None:
    noise = unfolded_noise(golden, torch.float32)
    assert relative(noise, golden.denoiser["noise_pred"]) <= FP32


def unfolded_noise(golden: Golden, dtype: torch.dtype) -> Tensor:
    """The bench's released peer on the golden denoiser call, in released row order."""

    from diffusers import DDPMScheduler, UNet2DConditionModel

    from dualdiff_engine import adapters
    from dualdiff_engine.bench.step.case import adapter_on

    unet: Any = UNet2DConditionModel.from_pretrained(
        golden.folder / "model" / "unet", torch_dtype=dtype, low_cpu_mem_usage=False
    )
    adapter = adapters.load(golden.folder / "adapter", allow_pickle=True)
    peer = ReleasedUNet(unet.eval(), adapter_on(adapter, dtype))
    d = golden.denoiser
    context = d["encoder_hidden_states"].to(dtype)
    if golden.background:
        noiser = DDPMScheduler.from_pretrained(golden.folder / "model" / "scheduler")
        latents = noiser.add_noise(
            d["background_latent"], d["background_noise"], d["timestep"].long()
        )
        peer.background_pass(latents.to(dtype), d["timestep"], context[0::2])
    return peer(d["sample"].to(dtype), d["timestep"], context)
