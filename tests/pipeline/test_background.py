"""Background compensation: pictures and masks in, noise modes, reuse across batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualdiff_engine import Background, Engine, SettingsError
from dualdiff_engine.pipeline.background import BackgroundBank, cut_out, encode, fixed_noise

PICTURE = np.random.default_rng(0).integers(1, 255, (64, 64, 3), dtype=np.uint8)
MASK = np.zeros((64, 64), np.uint8)
MASK[16:48, 16:48] = 255
QUICK: dict[str, Any] = {"steps": 2, "size": 64, "output_type": "pt"}


def test_object_pixels_become_black() -> None:
    pixels = cut_out(Background(PICTURE, MASK), 64, 64)
    assert (pixels[16:48, 16:48] == 0).all()
    assert np.array_equal(pixels[:16], PICTURE[:16])


def test_sources_of_pictures_agree(tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "picture.png")
    Image.fromarray(MASK).convert("1").save(tmp_path / "mask.png")
    expected = cut_out(Background(PICTURE, MASK), 32, 40)
    assert expected.shape == (32, 40, 3)
    for background in (
        Background(tmp_path / "picture.png", str(tmp_path / "mask.png")),
        Background(Image.fromarray(PICTURE), Image.fromarray(MASK)),
    ):
        assert np.array_equal(cut_out(background, 32, 40), expected)


def test_latents_are_means_of_grey_and_picture_unscaled(bcm: Engine) -> None:
    latents = encode(bcm.vae, PICTURE)
    grey = bcm.vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
    picture = torch.from_numpy(PICTURE).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(latents[:1], grey, atol=1e-5)
    assert torch.allclose(latents[1:], bcm.vae.encode(picture).latent_dist.mean, atol=1e-5)


def passes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Records the noised latents of every background pass."""
    seen: list[torch.Tensor] = []
    real = engine.unet.background_shares

    def record(latents: torch.Tensor, *rest: Any) -> Any:
        seen.append(latents.clone())
        return real(latents, *rest)

    monkeypatch.setattr(engine.unet, "background_shares", record)
    return seen


def test_fresh_noise_is_new_for_every_call(bcm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes(bcm, monkeypatch)
    bcm.generate(seeds=[1, 2], batch=1, background=Background(PICTURE, MASK), **QUICK)
    calls = len(seen) // 2
    # one pass per call serves the whole batch, and every batch sees the same sequence
    assert len(seen) == 2 * calls == 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(seen[:calls], seen[calls:], strict=True))
    assert not torch.equal(seen[0], seen[1])


def test_fixed_noise_is_computed_once(bcm: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = passes(bcm, monkeypatch)
    background = Background(PICTURE, MASK, noise="fixed")
    first = bcm.generate(seeds=[1], background=background, **QUICK)[0]
    # PNDM calls one timestep twice
    assert len(seen) == 2
    again = bcm.generate(seeds=[1, 3], batch=1, background=background, **QUICK)[0]
    assert len(seen) == 2
    assert torch.equal(first.image, again.image)
    assert again.recipe["background"]["noise"] == "fixed"
    assert again.recipe["background"]["noise_seed"] == 0
    assert len(again.recipe["background"]["picture_sha256"]) == 64
    bcm.generate(seeds=[1], background=Background(255 - PICTURE, MASK, noise="fixed"), **QUICK)
    assert len(seen) == 4


def test_the_background_reaches_the_image_branch(bcm: Engine) -> None:
    one, two, seed = (
        bcm.generate(seeds=[1], background=background, **QUICK)[0]
        for background in (
            Background(PICTURE, MASK),
            Background(255 - PICTURE, MASK),
            Background(PICTURE, MASK, noise_seed=1),
        )
    )
    assert not torch.equal(one.image, two.image)
    assert not torch.equal(one.image, seed.image)


def test_without_guidance_only_the_picture_is_passed(
    bcm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes(bcm, monkeypatch)
    bcm.generate(seeds=[1], guidance=1.0, background=Background(PICTURE, MASK), **QUICK)
    assert {latents.shape[0] for latents in seen} == {1}


def test_shares_that_do_not_fit_are_not_kept() -> None:
    class Noiser:
        def add_noise(self, latents: Any, noise: Any, timestep: Any) -> Any:
            return latents + noise

    runs: list[float] = []

    def run(noised: torch.Tensor, bias: Any) -> list[torch.Tensor]:
        runs.append(float(noised.sum()))
        return [torch.zeros(100)]

    bank = BackgroundBank(torch.zeros(2, 4, 8, 8), Noiser(), "fixed", 0, budget=500)
    for timestep in (10.0, 20.0, 10.0, 20.0):
        bank.shares(torch.tensor(timestep), [], run)
    # one of 400 bytes is kept, the other is drawn again, the same
    assert len(runs) == 3
    assert runs[1] == runs[2]


def test_fixed_noise_depends_on_seed_and_timestep() -> None:
    shape = (2, 4, 8, 8)
    draw = fixed_noise(shape, 0, 481.0)
    assert torch.equal(draw, fixed_noise(shape, 0, 481.0))
    assert not torch.equal(draw, fixed_noise(shape, 1, 481.0))
    assert not torch.equal(draw, fixed_noise(shape, 0, 480.0))


def test_an_adapter_with_background_needs_one(bcm: Engine) -> None:
    with pytest.raises(SettingsError, match="trained with background: pass background"):
        bcm.generate()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Background(PICTURE, noise="none"), "must be 'fresh' or 'fixed', got 'none'"),
        (lambda: Background(PICTURE, noise_seed=-1), "noise_seed must be from 0"),
        (lambda: Background("missing.png"), "background picture: no file 'missing.png'"),
        (lambda: Background(PICTURE, "no.png"), "background object_mask: no file 'no.png'"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()


@pytest.mark.parametrize(
    ("background", "message"),
    [
        (Background(PICTURE, MASK[:32]), r"object_mask is \(64, 32\), its picture \(64, 64\)"),
        (Background(PICTURE.astype(np.float32)), r"picture holds floats from 1 to 254: scale them"),
        (Background(PICTURE, 5), "object_mask must be a path, a PIL image or a NumPy array"),
        (Background(__file__), r"test_background\.py is not a readable picture"),
        (Background(PICTURE, MASK * 0), "object_mask has no white pixel: draw the object in white"),
        (Background(PICTURE, MASK * 0 + 255), "object_mask is all white"),
        (Background(PICTURE, 255 - MASK), "object_mask is white along its whole border"),
    ],
)
def test_wrong_pictures(bcm: Engine, background: Background, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        bcm.generate(background=background, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background_latents": torch.zeros(1, 4, 8, 8)}, r"background_latents must be .*\[2, 4"),
        (
            {
                "background_latents": torch.zeros(2, 4, 8, 8),
                "background_noise": torch.zeros(2, 2, 4, 8, 8),
            },
            r"background_noise must be a floating-point tensor \[3, 2, 4, 8, 8\]",
        ),
    ],
)
def test_wrong_draws(bcm: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        bcm.generate(**options, **QUICK)
