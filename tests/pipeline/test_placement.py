"""Placement: noise levels of every scheduler, what is kept, what is pasted, what is refused."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dualdiff_engine import (
    Background,
    Engine,
    Placement,
    RegionStatistics,
    SettingsError,
)
from dualdiff_engine.base_model.schedulers import Schedulers
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.pipeline.blend import noise_levels
from dualdiff_engine.pipeline.encode import PictureLatents
from dualdiff_engine.pipeline.placement import edge_weight, pooled
from support import DATA, Recorder, golden_engine

SCHEDULERS = Schedulers(DATA / "dual" / "model" / "scheduler" / "scheduler_config.json")
NAMES = sorted(set(SCHEDULERS._kinds) - {"DPMSolverSDEScheduler"})
STOCHASTIC = {
    *("DDPMScheduler", "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
}
QUICK: dict[str, Any] = {"steps": 3, "size": 64}


def picture(seed: int = 0, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (side, side, 3), dtype=np.uint8)


def box(top: int, left: int, side: int = 24, of: int = 64) -> np.ndarray:
    region = np.zeros((of, of), np.uint8)
    region[top : top + side, left : left + side] = 255
    return region


def object_mask() -> np.ndarray:
    return box(8, 8, 48)


def placed(seed: int = 0, **options: Any) -> Placement:
    defaults: dict[str, Any] = {"edge": 1, "object_mask": object_mask()}
    return Placement(picture(seed), box(16, 8 + 4 * seed), **{**defaults, **options})


def pixels(pair: Any) -> np.ndarray:
    return np.stack([np.asarray(pair.image), np.asarray(pair.anomaly)]).astype(int)


def stepped(name: str, steps: int = 6) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = SCHEDULERS.make(name)
        scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_that_a_scheduler_makes_itself(name: str) -> None:
    """A network that knows the noise: then every step leads to clean latents and noise exactly.

    Schedulers that draw are compared by mean and deviation of many latents.
    """
    levels = noise_levels(stepped(name))
    scheduler = stepped(name)
    assert len(levels) == len(scheduler.timesteps) + 1
    assert levels[-1] == (1.0, 0.0)
    count = 100_000 if name in STOCHASTIC else 1
    generator = torch.Generator().manual_seed(0)
    clean = torch.full((1, 1, 1, count), 0.7, dtype=torch.float64)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    scale, sigma = levels[0]
    latents = scale * clean + sigma * noise
    extra = {"generator": generator} if name in STOCHASTIC else {}
    for call, timestep in enumerate(scheduler.timesteps[:-1]):
        scheduler.scale_model_input(latents, timestep)
        scale, sigma = levels[call]
        # of the latents as they are: fresh noise counts
        known = (latents - scale * clean) / sigma
        latents = scheduler.step(known, timestep, latents, **extra).prev_sample
        scale, sigma = levels[call + 1]
        if name in STOCHASTIC:
            # five deviations of a mean and of a deviation of so many draws
            band = 5 * max(sigma, 1e-6) / math.sqrt(count)
            assert abs(float(latents.mean()) - scale * 0.7) <= band
            assert abs(float(latents.std()) - sigma) <= band
        else:
            # tables of schedulers are fp32: rounding, and cancellation in their exponentials
            assert torch.allclose(latents, scale * clean + sigma * noise, rtol=0, atol=2e-5 * sigma)


def test_levels_follow_the_timestep_where_it_is_one_of_training() -> None:
    """Both families agree on the ratio of noise to picture."""
    for name in ("DDIMScheduler", "EulerDiscreteScheduler"):
        scheduler = stepped(name)
        kept = SCHEDULERS.noiser().alphas_cumprod
        for timestep, (scale, sigma) in zip(
            scheduler.timesteps, noise_levels(stepped(name)), strict=False
        ):
            share = float(kept[int(timestep)])
            assert sigma / scale == pytest.approx(math.sqrt(1 / share - 1), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_outside_the_region_latents_follow_the_picture(dual: Engine, name: str) -> None:
    """Also in what a solver keeps between its steps: the network is fed nothing else."""
    seen: list[Tensor] = []
    own = placed()
    levels = noise_levels(stepped(name, 4))

    def keep(engine: Engine, step: int, timestep: Any, inputs: dict[str, Tensor]) -> None:
        seen.append(inputs["latents"].clone())

    dual.generate(
        seeds=[5], placement=own, scheduler=name, steps=4, size=64, callback_on_step_end=keep
    )
    latents = PictureLatents(dual.vae)
    clean = torch.stack([latents.of(picture()), latents.of(np.zeros((64, 64, 3), np.uint8))])
    clean *= dual.vae.config.scaling_factor
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    untouched = torch.from_numpy(pooled(edge_weight(box(16, 8) > 0, 8), 8)) == 0
    assert 20 < int(untouched.sum()) < 60
    for (scale, sigma), after in zip(levels[1:], seen, strict=True):
        expected = scale * clean + sigma * noise
        # the sum of two fp32 products, in another order
        assert torch.allclose(
            after[0][..., untouched], expected[..., untouched], rtol=1e-6, atol=1e-6
        )
    assert torch.equal(seen[-1][0][..., untouched], clean[..., untouched])


def test_a_corrector_sees_the_blended_latents(
    dual: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UniPC's states: what it steps from equals the picture's noised latents outside."""
    states: list[Tensor] = []
    real = diffusers.UniPCMultistepScheduler.multistep_uni_p_bh_update

    def watch(self: Any, model_output: Tensor, *rest: Any, sample: Tensor, **named: Any) -> Tensor:
        states.append(sample.clone())
        return real(self, model_output, *rest, sample=sample, **named)

    monkeypatch.setattr(diffusers.UniPCMultistepScheduler, "multistep_uni_p_bh_update", watch)
    name = "UniPCMultistepScheduler"
    own = placed(paste=False)
    dual.generate(seeds=[5], placement=own, scheduler=name, steps=4, size=64)
    levels = noise_levels(stepped(name, 4))
    untouched = torch.from_numpy(pooled(edge_weight(box(16, 8) > 0, 8), 8)) == 0
    black = PictureLatents(dual.vae).of(np.zeros((64, 64, 3), np.uint8))
    black *= dual.vae.config.scaling_factor
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))[1]
    # the last entries are of this run: choosing a scheduler tried its steps, too
    for (scale, sigma), state in zip(levels, states[-4:], strict=False):
        expected = scale * black + sigma * noise
        assert torch.allclose(
            state[0, 1][..., untouched], expected[..., untouched], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("edge", [0, 1, 2.5])
def test_pasted_pictures_change_in_the_region_and_its_edge_alone(dual: Engine, edge: float) -> None:
    region = box(24, 24, 16)
    (pair,) = dual.generate(seeds=[3], placement=Placement(picture(), region, edge=edge), **QUICK)
    image, anomaly, mask = (np.asarray(x) for x in (pair.image, pair.anomaly, pair.mask))
    outside = edge_weight(region > 0, edge * 8) == 0
    assert np.array_equal(image[outside], picture()[outside])
    assert not anomaly[outside].any()
    assert not mask[outside].any()
    assert (image[region > 0] != picture()[region > 0]).mean() > 0.9
    assert np.array_equal(np.asarray(pair.region), region)


def test_pasted_to_the_mask_what_the_mask_calls_normal_is_normal(dual: Engine) -> None:
    region = box(24, 24, 16)
    drawn = {
        paste: dual.generate(
            seeds=[3], placement=Placement(picture(), region, paste=paste), **QUICK
        )[0]
        for paste in ("region", "mask")
    }
    image, mask = (np.asarray(x) for x in (drawn["mask"].image, drawn["mask"].mask))
    assert np.array_equal(mask, np.asarray(drawn["region"].mask))
    assert mask.any()
    untouched = edge_weight(mask > 0, 4) == 0
    assert np.array_equal(image[untouched], picture()[untouched])
    assert not np.asarray(drawn["mask"].anomaly)[untouched].any()
    # in the mask both are what was drawn
    white = mask > 0
    assert np.array_equal(image[white], np.asarray(drawn["region"].image)[white])
    assert drawn["mask"].scores["change_outside"] <= drawn["region"].scores["change_outside"]
    assert drawn["mask"].recipe["placement"]["paste"] == "mask"


def test_a_pasted_difference_is_what_was_drawn_less_what_the_vae_rebuilds(dual: Engine) -> None:
    region, options = box(24, 24, 16), {**QUICK, "output_type": "pt"}
    drawn, added = (
        dual.generate(seeds=[3], placement=Placement(picture(), region, paste=paste), **options)[0]
        for paste in ("none", "difference")
    )
    own = torch.from_numpy(picture()).permute(2, 0, 1).double() / 255
    weight = torch.from_numpy(edge_weight(region > 0, 2 * 8)).double()
    change = drawn.image.double() - PictureLatents(dual.vae).rebuilt(picture()).double()
    expected = (own + weight * change).clamp(0, 1)
    # four roundings of numbers up to 2
    assert (added.image - expected).abs().max() < 4 * 2**-23
    assert torch.equal(added.image[:, weight == 0], own[:, weight == 0].float())
    assert (change * weight).abs().max() > 0.05
    assert added.recipe["placement"]["paste"] == "difference"


def test_without_paste_pictures_are_the_decoder_s(dual: Engine) -> None:
    from dualdiff_engine.pipeline.decode import decode

    seen: list[Tensor] = []

    def keep(engine: Engine, step: int, timestep: Any, inputs: dict[str, Tensor]) -> None:
        seen.append(inputs["latents"].clone())

    options = {**QUICK, "output_type": "pt", "callback_on_step_end": keep}
    (pair,) = dual.generate(seeds=[3], placement=placed(paste=False), **options)
    image, anomaly = decode(dual.vae, seen[-1][0])
    assert torch.equal(pair.image, image)
    assert torch.equal(pair.anomaly, anomaly)
    assert pair.recipe["placement"]["paste"] == "none"


@pytest.mark.parametrize("case", ["dual", "bcm"])
@pytest.mark.parametrize("paste", [True, False, "mask", "difference"])
def test_mixed_placements_in_a_batch_change_no_pair(
    case: str, paste: bool | str, engine_of: Any
) -> None:
    engine = engine_of(case)
    each = [placed(seed, paste=paste, edge=seed) for seed in range(3)]
    mixed = engine.generate(seeds=[0, 1, 2], batch=3, placement=each, **QUICK)
    for seed, pair in enumerate(mixed):
        (alone,) = engine.generate(seeds=[seed], placement=each[seed], **QUICK)
        # the products of a batch are rounded in another order: at most one grey level
        assert np.abs(pixels(pair) - pixels(alone)).max() <= 1
        assert pair.recipe["placement"] == alone.recipe["placement"]
        assert pair.recipe["background"] == alone.recipe["background"]
        outside = edge_weight(np.asarray(each[seed].region) > 0, 8.0 * seed) == 0
        if paste:
            assert np.array_equal(np.asarray(pair.image)[outside], picture(seed)[outside])
    hashes = {pair.recipe["placement"]["picture_sha256"] for pair in mixed}
    assert len(hashes) == 3


def test_backgrounds_of_a_batch_run_in_one_pass(
    bcm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    real = bcm.unet.background_shares
    monkeypatch.setattr(
        bcm.unet,
        "background_shares",
        lambda latents, *rest: rows.append(len(latents)) or real(latents, *rest),
    )
    around = [Background(picture(n), object_mask()) for n in (0, 1, 0)]
    pairs = bcm.generate(seeds=[1, 2, 3], batch=3, background=around, **QUICK)
    # two guidance rows of two different backgrounds, in every call
    assert set(rows) == {4}
    for seed, own, pair in zip((1, 2, 3), around, pairs, strict=True):
        (alone,) = bcm.generate(seeds=[seed], background=own, **QUICK)
        assert np.abs(pixels(pair) - pixels(alone)).max() <= 1
        assert pair.recipe["background"] == alone.recipe["background"]


def test_the_picture_is_its_own_background(bcm: Engine) -> None:
    own = placed(1)
    (pair,) = bcm.generate(seeds=[1], placement=own, **QUICK)
    (given,) = bcm.generate(
        seeds=[1], placement=own, background=Background(picture(1), object_mask()), **QUICK
    )
    assert np.array_equal(pixels(pair), pixels(given))
    assert pair.recipe["background"] == given.recipe["background"]
    (other,) = bcm.generate(
        seeds=[1], placement=own, background=Background(picture(2), object_mask()), **QUICK
    )
    assert not np.array_equal(pixels(pair), pixels(other))


def test_a_batch_that_is_halved_keeps_its_placements(
    bcm: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = golden_engine("bcm")
    each = [placed(seed) for seed in range(3)]
    options = {"scheduler": "EulerAncestralDiscreteScheduler", **QUICK}
    expected = engine.generate(seeds=range(3), batch=1, placement=each, **options)
    real = type(engine.unet).forward

    def small(self: Any, latents: Any, *rest: Any) -> Any:
        if latents.shape[2] > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return real(self, latents, *rest)

    monkeypatch.setattr(type(engine.unet), "forward", small)
    pairs = engine.generate(seeds=range(3), batch=3, placement=each, **options)
    for one, other in zip(expected, pairs, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_graphs_draw_the_same_pairs() -> None:
    """A recorder stands for the capture; every pair has its own background."""
    plain, graphed = golden_engine("bcm"), golden_engine("bcm")
    graphed.denoiser = GraphedDenoiser(graphed.unet, Recorder())
    each = [placed(seed) for seed in range(2)]
    for one, other in zip(
        *(e.generate(seeds=range(2), batch=2, placement=each, **QUICK) for e in (plain, graphed)),
        strict=True,
    ):
        assert np.array_equal(pixels(one), pixels(other))


def test_sampled_regions_follow_the_seed(dual: Engine) -> None:
    statistics = RegionStatistics(((0.05, 1.5),), (1,))
    own = Placement(picture(), statistics, object_mask=object_mask(), edge=0)
    one, two = dual.generate(seeds=[1, 2], placement=own, **QUICK)
    (again,) = dual.generate(seeds=[2], placement=own, **QUICK)
    regions = [np.asarray(pair.region) > 0 for pair in (one, two, again)]
    assert np.array_equal(regions[1], regions[2])
    assert not np.array_equal(regions[0], regions[1])
    for region in regions:
        assert not region[object_mask() == 0].any()
    assert two.recipe["placement"]["statistics"] == {"parts": [[0.05, 1.5]], "counts": [1]}
    # the recipe holds what the region is made from: pairs of a run share it
    assert one.recipe["placement"] == two.recipe["placement"]


@pytest.mark.parametrize("size", [(64, 64), (72, 104)])
def test_odd_sizes_and_half_precision(engine_of: Any, size: tuple[int, int]) -> None:
    engine = engine_of("dual", "bfloat16")
    own = Placement(picture(side=96), box(20, 30, 40, of=96), edge=1)
    (pair,) = engine.generate(seeds=[1], placement=own, steps=2, size=size)
    resized = Image.fromarray(picture(side=96)).resize(size[::-1], Image.Resampling.BICUBIC)
    region = np.asarray(pair.region) > 0
    outside = edge_weight(region, 8) == 0
    assert np.array_equal(np.asarray(pair.image)[outside], np.asarray(resized)[outside])
    assert pair.region.size == size[::-1]


def test_files_are_read_and_may_not_change(dual: Engine, tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "good.png")
    Image.fromarray(box(16, 8)).save(tmp_path / "region.png")
    own = Placement(tmp_path / "good.png", str(tmp_path / "region.png"), edge=1)
    (pair,) = dual.generate(seeds=[1], placement=own, **QUICK)
    (array,) = dual.generate(seeds=[1], placement=replace(placed(), object_mask=None), **QUICK)
    assert np.array_equal(pixels(pair), pixels(array))
    # more than are kept open at once
    others = [Placement(picture(n), box(8, 8)) for n in range(9)]
    stream = dual.stream(seeds=range(10), batch=1, placement=[own, *others], **QUICK)
    Image.fromarray(picture(1)).save(tmp_path / "good.png")
    with pytest.raises(SettingsError, match="placement 0 changed since the run began"):
        next(stream)


def test_as_many_pairs_as_placements(dual: Engine) -> None:
    assert len(dual.generate(placement=[placed(), placed(1)], steps=1, size=64)) == 2


def bad(**changed: Any) -> Placement:
    return replace(placed(), **changed)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (bad(region=box(0, 0, 0)), "placement region has no white pixel: draw"),
        (bad(region=box(0, 0, 64)), "placement region is all white, so nothing of the picture"),
        (bad(region=box(9, 9, 7)), r"smaller than a latent pixel \(8 x 8 pixels\) at 64 x 64"),
        (bad(region=box(0, 0, 8)), "placement region lies off the object: move it"),
        (bad(region=box(8, 8)[:32]), r"placement region is \(64, 32\), its picture \(64, 64\)"),
        (bad(object_mask=box(0, 0)[:9]), r"placement object_mask is \(64, 9\), its picture"),
        (bad(object_mask=box(0, 0, 0)), "placement object_mask has no white pixel"),
        (bad(picture=5), "placement picture must be a path, a PIL image or a NumPy array"),
        (bad(picture=__file__), r"test_placement\.py is not a readable picture"),
        (
            bad(region=RegionStatistics(((0.1, 1.0),), (1,)), object_mask=None),
            "placement picture: the object was not found for sure .* pass object_mask",
        ),
        ([placed(), bad(region=box(0, 0, 0))], "placement 1 region has no white pixel"),
        ([placed()] * 3, "placement lists 3 for 2 pairs: give one per pair, or one for all"),
        ([], "placement is an empty list"),
        (picture(), "placement must be Placement"),
    ],
)
def test_wrong_placements(dual: Engine, placement: Any, message: str) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("computed before checking")

    with pytest.raises(SettingsError, match=message):
        dual.stream(seeds=[1, 2], placement=placement, size=64, callback_on_step_end=never)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edge": -1}, "edge must be from 0 to 16 latent pixels, got -1"),
        ({"edge": True}, "edge must be from 0"),
        ({"edge": float("nan")}, "edge must be from 0"),
        ({"paste": "edge"}, "paste must be one of none, region, mask, difference"),
        ({"region": None}, "region is None"),
        ({"picture": "no.png"}, r"placement picture: no file 'no\.png'"),
        ({"object_mask": "no.png"}, "placement object_mask: no file"),
    ],
)
def test_wrong_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Placement(**{"picture": picture(), "region": box(0, 0), **options})


def test_wrong_backgrounds(bcm: Engine) -> None:
    around = Background(picture(), object_mask())
    for background, message in (
        ([around] * 3, "background lists 3 for 2 pairs"),
        ("no", "background must be Background"),
    ):
        with pytest.raises(SettingsError, match=message):
            bcm.generate(seeds=[1, 2], background=cast(Any, background), **QUICK)
