"""Every step count that a run accepts draws finite latents; the rest is refused beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dualdiff_engine import Engine, SettingsError
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.demo.presets import BASE
from dualdiff_engine.ops import bind
from dualdiff_engine.pipeline.background import BackgroundBank
from dualdiff_engine.pipeline.denoise import Schedule, denoise
from dualdiff_engine.settings import ChosenSampling
from hostile_bases import base_copy, change_json
from support import DATA


class Stub:
    """A denoiser in name: it predicts a share of what it is given."""

    def time_inputs(self, timesteps: torch.Tensor) -> list[Any]:
        return list(timesteps)

    def background_shares(self, latents: torch.Tensor, *_: Any) -> list[torch.Tensor]:
        assert latents.isfinite().all()
        return []

    def __call__(self, latents: torch.Tensor, *_: Any) -> torch.Tensor:
        return 0.3 * latents


@pytest.fixture(scope="module", params=["golden", "demo"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return BaseModel(DATA / "dual/model" if request.param == "golden" else BASE)


def offered(base: BaseModel) -> list[str]:
    """The schedulers that the message for a wrong name lists."""
    with pytest.raises(SettingsError, match="choose one of") as caught:
        base.make_scheduler("none")
    return str(caught.value).partition("one of ")[2].split(", ")


def latents_of(base: BaseModel, name: str, steps: int, *, background: bool) -> torch.Tensor:
    schedule = Schedule(lambda: base.make_scheduler(name), steps)
    bank = BackgroundBank(torch.ones(1, 4, 1, 1), base.noiser(), "fresh", 0, 0)
    sampling = ChosenSampling(steps, 1.0, name, 8, 8)
    latents = denoise(
        Stub(),  # type: ignore[arg-type]
        bind("reference"),
        schedule.fresh(),
        torch.ones(1, 2, 4, 1, 1),
        [],
        sampling,
        [torch.Generator().manual_seed(0)],
        bank if background else None,
        lambda step, timestep, latents: latents,
    )
    assert latents is not None
    return latents


@pytest.mark.parametrize(
    ("steps", "background"), [*((n, True) for n in (1, 2, 3, 7, 50)), (3, False)]
)
def test_every_count_draws_or_is_refused(base: BaseModel, steps: int, background: bool) -> None:
    refused, names = [], offered(base)
    for name in names:
        try:
            assert latents_of(base, name, steps, background=background).isfinite().all(), name
        except SettingsError as error:
            refused.append(str(error))
    # a package that is not there, or a count with another to use
    assert all("needs another package" in r or "steps, or another" in r for r in refused)
    # PNDM needs four steps where it begins with a Runge-Kutta method
    assert len(refused) <= 2


@pytest.mark.parametrize("steps", [999, 1000])
def test_counts_as_long_as_the_noise_schedule(steps: int) -> None:
    base = BaseModel(DATA / "dual/model")
    drawn, refused = [], []
    for name in offered(base):
        try:
            scheduler = base.make_scheduler(name)
            scheduler.set_timesteps(steps)
        except SettingsError as error:
            refused.append(str(error))
            continue
        times = scheduler.timesteps
        # a background is noised to all of them
        base.noiser().add_noise(torch.ones(len(times)), torch.ones(1), times.round().long())
        latents = torch.ones(1, 2, 4, 1, 1) * scheduler.init_noise_sigma
        for timestep in times:
            scaled = scheduler.scale_model_input(latents, timestep)
            latents = scheduler.step(0.3 * scaled, timestep, latents).prev_sample
        assert latents.isfinite().all(), name
        drawn.append(name)
    assert all("needs another package" in r or "steps, or another" in r for r in refused)
    assert ("DDIMScheduler" in drawn) == (steps == 999)


def test_a_thousand_steps_are_refused_before_anything_is_computed(dual: Engine) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("computed before checking")

    with pytest.raises(SettingsError, match=r"cannot take 1000 steps .* use 999 steps, or another"):
        dual.generate(seeds=1, steps=1000, size=64, callback_on_step_end=never)


def test_the_released_integrator_says_how_many_steps_it_needs() -> None:
    with pytest.raises(SettingsError, match=r"cannot take 2 steps .* use 4 steps"):
        BaseModel(BASE).make_scheduler("PNDMScheduler").set_timesteps(2)


def test_a_network_for_other_timesteps_is_not_offered(base: BaseModel) -> None:
    assert "EDMEulerScheduler" not in offered(base)
    assert {"PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"} <= set(offered(base))


def test_trying_a_count_leaves_no_trace(base: BaseModel) -> None:
    before = torch.get_rng_state()
    scheduler = base.make_scheduler("EulerAncestralDiscreteScheduler")
    scheduler.set_timesteps(5)
    assert torch.equal(before, torch.get_rng_state())
    assert scheduler.step_index is None
    assert type(scheduler).__name__ == "EulerAncestralDiscreteScheduler"


@pytest.mark.parametrize(
    "values",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"timestep_spacing": "linspace", "num_train_timesteps": 500},
        {"trained_betas": [0.001 + 1e-5 * n for n in range(1000)]},
        {"beta_start": 0.98, "beta_end": 0.99},
    ],
)
def test_other_noise_schedules_draw_or_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = base_copy(tmp_path)
    change_json(folder / "scheduler/scheduler_config.json", **values)
    base, refused = BaseModel(folder), []
    for name in ("PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
        try:
            assert latents_of(base, name, 10, background=True).isfinite().all()
        except SettingsError as error:
            refused.append(str(error))
    assert all("cannot take 10 steps" in reason for reason in refused)
