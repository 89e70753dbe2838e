"""The trainable network and its draws: the same function as the engine's, and trainable."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dualdiff_engine import Engine, adapters
from dualdiff_engine.adapters import files
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import AdapterError, SettingsError
from dualdiff_engine.training import TrainingOptions
from dualdiff_engine.training.data import find_examples
from dualdiff_engine.training.latents import LatentSet, encode
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.trainer import _Run
from support import by_branch, load_golden, relative
from training_cases import (
    DEFECT,
    base_of,
    inputs_of,
    network_of,
    options_of,
    write_data,
)

# two computations of one function in fp32
AGREE = 5e-6


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    """Unlike elsewhere, gradients are wanted."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["dual", "bcm"])
def test_agrees_with_the_released_program(name: str) -> None:
    golden = load_golden(name)
    base = BaseModel(golden.folder / "model")
    options = TrainingOptions(
        DEFECT,
        background=golden.background,
        text_encoder=True,
        rank=golden.settings["rank"],
    )
    network = TrainableNetwork(base, options, torch.device("cpu"), torch.float32)
    tensors = files.read(files.find(golden.folder / "adapter", allow_pickle=True))
    # text sites of released adapters carry a blend that nothing reads
    unread = [n for n in tensors if "attn2" in n and ("condition_mlp" in n or "temporal_a" in n)]
    network.load({n: t for n, t in tensors.items() if n not in unread})
    d = golden.denoiser
    noised = None
    if golden.background:
        noised = base.noiser().add_noise(
            d["background_latent"], d["background_noise"], d["timestep"].long()
        )
    pairs = len(d["sample"]) // 2
    with torch.no_grad():
        noise = network(
            by_branch(d["sample"]),
            d["timestep"].expand(pairs),
            by_branch(d["encoder_hidden_states"]),
            noised,
        )
    assert relative(noise, by_branch(d["noise_pred"])) <= AGREE


@pytest.mark.parametrize("background", [False, True])
def test_engine_runs_what_was_trained(background: bool, tmp_path: Path) -> None:
    network = network_of(background=background, text_encoder=True)
    path = tmp_path / "adapter.safetensors"
    files.write(path, network.tensors())
    latents, times, _, surroundings = inputs_of(background)
    assert latents is not None
    assert times is not None
    with Engine.from_pretrained(base_of(background), adapter=path) as engine:
        context = engine.encode_prompts()[:, 1:]
        expected = [
            engine.predict_noise(
                latents[:, None, n : n + 1],
                float(times[n]),
                context,
                None if surroundings is None else surroundings[n : n + 1],
            )[:, 0, 0]
            for n in range(2)
        ]
    with torch.no_grad():
        own = network.encode(["a vfx with sks", "sks"]).unflatten(0, (2, 1))
        noise = network(latents, times, own, surroundings)
    assert relative(own, context) <= AGREE
    assert relative(noise, torch.stack(expected, dim=1)) <= AGREE


def test_one_context_for_all_is_the_same_as_one_each() -> None:
    network = network_of(background=True)
    latents, times, context, surroundings = inputs_of(True)
    assert context is not None
    with torch.no_grad():
        shared = network(latents, times, context, surroundings)
        each = network(latents, times, context.expand(-1, 2, -1, -1), surroundings)
    assert relative(shared, each) <= AGREE


def test_starts_at_the_base() -> None:
    network = network_of(disturbed=False, text_encoder=True)
    latents, times, context, _ = inputs_of(False)
    assert latents is not None
    assert context is not None
    unet = BaseModel(base_of(False)).load_unet(torch.device("cpu"), torch.float32)
    with torch.no_grad():
        noise = network(latents, times, context)
        plain = [unet(latents[b], times, context[b].expand(2, -1, -1)).sample for b in (0, 1)]
        own, pristine = (
            network.encode(["sks"]),
            network.text.encode(network.text.tokenize(["sks"]), {}),
        )
    assert relative(noise, torch.stack(plain)) <= AGREE
    assert torch.equal(own, pristine)


def gradients(network: TrainableNetwork) -> dict[str, Tensor]:
    latents, times, context, surroundings = inputs_of(network.background)
    if network.trains_text:
        context = network.encode(["a vfx with sks", "sks"]).unflatten(0, (2, 1))
    network(latents, times, context, surroundings).float().square().sum().backward()
    found = {}
    for name, parameter in network.parameters.items():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


@pytest.mark.parametrize("background", [False, True])
def test_gradients_reach_the_adapter_and_nothing_else(background: bool) -> None:
    network = network_of(background=background, text_encoder=True)
    for name, gradient in gradients(network).items():
        assert gradient.isfinite().all(), name
        # queries and keys of a softmax over two feel no common shift: that one is zero exactly
        if not name.endswith("temporal_k.bias"):
            assert gradient.abs().max() > 0, name
    own = {id(p) for p in network.parameters.values()}
    frozen = [*network.unet.parameters(), *network.text.encoder.parameters()]
    frozen = [p for p in frozen if id(p) not in own]
    assert len(frozen) > 200
    assert not any(p.requires_grad or p.grad is not None for p in frozen)


def test_gradient_checkpointing_changes_nothing() -> None:
    kept = gradients(network_of(background=True))
    recomputed = gradients(network_of(background=True, gradient_checkpointing=True))
    for name, gradient in kept.items():
        assert torch.equal(gradient, recomputed[name]), name


def test_bfloat16_trains_float32_parameters() -> None:
    network = network_of(background=True, dtype="bfloat16")
    assert next(network.unet.conv_in.parameters()).dtype == torch.bfloat16
    found = gradients(network)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_names_are_the_released_ones() -> None:
    plain, background = network_of(text_encoder=True), network_of(background=True)
    golden = files.read(files.find(load_golden("dual").folder / "adapter", allow_pickle=True))
    assert set(plain.tensors()) == set(golden)
    chained = [name for name in background.tensors() if ".chained_proc." in name]
    assert chained
    assert all(".attn1." in name for name in chained)
    parsed = adapters.parse(background.tensors(torch.float16))
    assert parsed.has_background
    assert parsed.rank == 4
    with pytest.raises(AdapterError, match="other options"):
        plain.load(background.tensors())


def fake_vae() -> Any:
    """Latents that are the picture itself: channel 0 to 2 red, green, blue; deviation 0."""

    def posterior(pixels: Tensor) -> Any:
        latents = torch.cat([pixels, pixels[:, :1]], dim=1)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(mean=latents, std=torch.zeros_like(latents))
        )

    config = SimpleNamespace(scaling_factor=0.5)
    return SimpleNamespace(
        encode=posterior, config=config, device=torch.device("cpu"), dtype=torch.float32
    )


def as_pixels(latents: Tensor) -> np.ndarray:
    return ((latents[:3] + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)


def test_flips_are_shared_and_pictures_are_cut(data: Path) -> None:
    options = options_of(background=True, flips="both")
    examples = find_examples(data, options)
    latents = encode(fake_vae(), examples, options, 64)
    assert latents.mean.shape == (3, 4, 2, 4, 64, 64)
    assert latents.background is not None
    assert latents.grey is not None
    assert latents.grey.abs().max() == 0
    for example, mean, surroundings in zip(examples, latents.mean, latents.background, strict=True):
        # the sets are in order: as is, left-right, up-down, both
        for flip, axes in enumerate([(), (1,), (0,), (0, 1)]):
            back = [np.flip(as_pixels(t), axes) for t in (2 * mean[flip, 0], 2 * mean[flip, 1])]
            around = np.flip(as_pixels(surroundings[flip]), axes)
            picture, mask, part = (
                np.asarray(_opened(p)) for p in (example.picture, example.mask, example.object_mask)
            )
            assert np.array_equal(back[0], picture)
            assert np.array_equal(back[1], picture * (mask > 127)[..., None])
            assert np.array_equal(around, picture * (part <= 127)[..., None])


def _opened(path: Path | None) -> Any:
    from PIL import Image

    assert path is not None
    return Image.open(path)


def random_set(pictures: int = 5, flips: int = 4, background: bool = False) -> LatentSet:
    generator = torch.Generator().manual_seed(0)
    mean, deviation = torch.randn(2, pictures, flips, 2, 4, 2, 2, generator=generator)
    if not background:
        return LatentSet(mean, deviation, None, None)
    return LatentSet(mean, deviation, mean[:, :, 0] + 1, torch.full((4, 2, 2), 7.0))


def test_a_step_is_a_function_of_seed_and_number() -> None:
    latents = random_set(background=True)
    four = latents.draw(options_of(batch=4), 3, 1000)
    parts = list(latents.draw(options_of(batch=1, accumulate=4), 3, 1000).split(1))
    assert len(parts) == 4
    for name in ("latents", "noise", "timesteps", "background", "background_noise"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(four, name))
    assert not torch.equal(latents.draw(options_of(batch=4), 4, 1000).noise, four.noise)
    assert not torch.equal(latents.draw(options_of(batch=4, seed=1), 3, 1000).noise, four.noise)
    # branches get noises of their own
    assert not torch.equal(four.noise[:, 0], four.noise[:, 1])


def test_every_epoch_shows_every_picture_once() -> None:
    latents = random_set()
    options = options_of(batch=3, latents="mean", flips="none")
    seen = []
    for step in range(10):
        for drawn in latents.draw(options, step, 1000).latents:
            same = (latents.mean == drawn).flatten(2).all(-1).nonzero()
            seen.append(int(same[0, 0]))
    assert all(sorted(seen[n : n + 5]) == [0, 1, 2, 3, 4] for n in range(0, 30, 5))
    assert len({tuple(seen[n : n + 5]) for n in range(0, 30, 5)}) > 1


def test_draws_are_spread_as_they_should_be() -> None:
    latents = random_set(pictures=2, flips=1, background=True)
    drawn = latents.draw(options_of(batch=4000, prompt_dropout=0.25), 0, 1000)
    assert (int(drawn.timesteps.min()), int(drawn.timesteps.max())) == (0, 999)
    # four standard errors
    assert abs(drawn.dropped.float().mean() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert drawn.background is not None
    grey = (drawn.background == 7).flatten(1).all(1)
    assert torch.equal(grey, drawn.dropped)
    first = (drawn.latents - latents.mean[0, 0]).abs().flatten(1).amax(1)
    second = (drawn.latents - latents.mean[1, 0]).abs().flatten(1).amax(1)
    assert torch.minimum(first, second).min() > 0, "the posterior is sampled"


@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_loss_is_the_sum_over_branches_of_squared_errors(
    target: str, data: Path, tmp_path: Path
) -> None:
    run = _Run(base_of(False), data, tmp_path, options_of(batch=3), False)
    run.target = target
    run.context = torch.zeros(2, 2, 77, 32)
    seen: dict[str, Tensor] = {}

    def nothing(noised: Tensor, times: Tensor, context: Tensor, background: Any) -> Tensor:
        seen["noised"] = noised
        return torch.zeros_like(noised)

    run.network = nothing  # type: ignore[assignment]
    drawn = random_set().draw(options_of(batch=3), 0, 1000)
    losses = run._losses(drawn)
    share = run.noiser.alphas_cumprod[drawn.timesteps][:, None, None, None, None]
    expected = drawn.noise
    if target == "v_prediction":
        expected = share.sqrt() * drawn.noise - (1 - share).sqrt() * drawn.latents
    assert torch.allclose(losses, expected.square().mean((0, 2, 3, 4)), rtol=1e-5)
    noised = share.sqrt() * drawn.latents + (1 - share).sqrt() * drawn.noise
    assert torch.allclose(seen["noised"], noised.transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 0}, "rank must be a whole number from 1"),
        ({"steps": True}, "steps must be"),
        ({"batch": 1.5}, "batch must be"),
        ({"pictures": 1}, "pictures must be a whole number from 2"),
        ({"flips": "diagonal"}, "flips must be none or"),
        ({"dtype": "float16"}, "dtype must be auto or"),
        ({"learning_rate": 0}, "learning_rate must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"prompt_dropout": 1.5}, "prompt_dropout must be"),
        ({"seed": -1}, "seed must be"),
        ({"defect": "../hole"}, "defect must be the name of a folder"),
    ],
)
def test_options_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        TrainingOptions(**{"defect": DEFECT, **changes})


def test_learning_rates() -> None:
    cosine = TrainingOptions(DEFECT, steps=110, warmup=10, learning_rate=1e-3, lr_schedule="cosine")
    rates = [cosine.rate(step) for step in range(110)]
    assert rates[:10] == pytest.approx([1e-3 * n / 11 for n in range(1, 11)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx(5e-4)
    assert 0 < rates[-1] < 1e-6
    assert {TrainingOptions(DEFECT).rate(step) for step in (0, 4999)} == {2e-5}
