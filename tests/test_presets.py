"""Presets and the scheduler's own options: what they expand to, what is refused and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualdiff_engine import Engine, Sampling, SettingsError
from dualdiff_engine.adapters import verdicts
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.cli.demo import filled as filled_demo
from dualdiff_engine.demo.presets import BASE
from dualdiff_engine.pair import differences, identity
from dualdiff_engine.settings import PRESETS, ChosenSampling
from support import DATA

SOLVER = "DPMSolverMultistepScheduler"


def filled(**given: Any) -> ChosenSampling:
    return Sampling(**given).filled(background=False, scheduler="PNDMScheduler", size=(64, 64))


def test_what_the_presets_are() -> None:
    released = {"steps": 100, "guidance": 2.5, "scheduler": "PNDMScheduler"}
    size = {"height": 64, "width": 64}
    assert filled().recorded() == filled(preset="released").recorded() == {**released, **size}
    solver = {"guidance": 2.5, "scheduler": SOLVER, **size, "spacing": "trailing", "order": 2}
    assert filled(preset="fast").recorded() == {"steps": 20, **solver}
    assert filled(preset="draft").recorded() == {"steps": 10, **solver}


def test_given_options_win_over_the_preset() -> None:
    assert filled(preset="fast", steps=15).steps == 15
    assert filled(preset="fast", order=3).schedule == {"spacing": "trailing", "order": 3}
    # options of the preset's solver are none of another scheduler
    other = filled(preset="fast", scheduler="EulerDiscreteScheduler")
    assert (other.steps, other.scheduler, other.schedule) == (20, "EulerDiscreteScheduler", {})
    times = filled(preset="fast", timesteps=[900, 500, 100])
    assert (times.steps, times.scheduler) == (3, SOLVER)
    assert times.schedule == {"order": 2, "timesteps": (900, 500, 100)}
    assert times.recorded()["timesteps"] == [900, 500, 100]


def test_what_is_recorded_is_what_sampling_takes() -> None:
    chosen = filled(preset="draft", guidance=3, karras=True)
    assert Sampling(**chosen.recorded()).filled(
        background=False, scheduler="none", size=(8, 8)
    ).recorded() == json.loads(json.dumps(chosen.recorded()))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "quick"}, "no preset 'quick': choose one of released, fast, draft"),
        ({"preset": ["fast"]}, "no preset"),
        ({"spacing": "even"}, "spacing must be one of linspace, leading, trailing, got 'even'"),
        ({"order": 0}, "order must be a whole number from 1 to 3"),
        ({"karras": 1}, "karras must be true or false, got 1"),
        ({"skip_prk": "no"}, "skip_prk must be true or false"),
        ({"timesteps": []}, "timesteps must be 1 to 1000 whole numbers in descending order"),
        ({"timesteps": [100, 200]}, "descending"),
        ({"timesteps": [5, 5]}, "descending"),
        ({"timesteps": [5, -1]}, "descending"),
        ({"timesteps": [5, 1.5]}, "whole numbers"),
        ({"timesteps": "999"}, "whole numbers"),
        ({"timesteps": [9, 5], "steps": 3}, "steps is 3 but there are 2 timesteps"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Sampling(**values)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("PNDMScheduler", {"order": 2}, "does not take order: .* takes spacing, skip_prk"),
        ("DDIMScheduler", {"timesteps": (9,)}, "does not take timesteps: .* takes spacing"),
        (SOLVER, {"skip_prk": True}, "takes spacing, order, karras, timesteps"),
        ("EulerAncestralDiscreteScheduler", {"karras": True}, "it takes spacing"),
    ],
)
def test_a_scheduler_says_what_it_takes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} {message}" if "not" in message else message):
        BaseModel(BASE).make_scheduler(name, options)


def test_every_option_reaches_its_scheduler() -> None:
    base = BaseModel(DATA / "dual/model")

    def times(name: str, steps: int = 5, **options: Any) -> list[float]:
        scheduler = base.make_scheduler(name, options)
        scheduler.set_timesteps(steps, device="cpu")
        return [round(float(time)) for time in scheduler.timesteps]

    assert times(SOLVER, spacing="trailing") == [999, 799, 599, 399, 199]
    assert times(SOLVER, spacing="leading") != times(SOLVER, spacing="trailing")
    assert times(SOLVER, karras=True) != times(SOLVER)
    assert times(SOLVER, timesteps=(900, 500, 100)) == [900, 500, 100]
    assert base.make_scheduler(SOLVER, {"order": 3}).config.solver_order == 3
    # the Runge-Kutta start makes 12 calls of three steps
    calls = len(times("PNDMScheduler", skip_prk=False)) - len(times("PNDMScheduler", skip_prk=True))
    assert calls == 8


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"timesteps": (5000, 1)}, 2, "cannot take these timesteps .*5000.* outside its noise"),
        ({"timesteps": (900, 500), "karras": True}, 2, "leave out or change timesteps, karras"),
        ({"spacing": "trailing"}, 1001, "cannot take 1001 steps"),
    ],
)
def test_what_a_scheduler_cannot_take(options: dict[str, Any], steps: int, message: str) -> None:
    scheduler = BaseModel(BASE).make_scheduler(SOLVER, options)
    with pytest.raises(SettingsError, match=message):
        scheduler.set_timesteps(steps)


def test_the_recipe_names_the_preset_and_counts_the_calls(dual: Engine) -> None:
    def recipe(**options: Any) -> dict[str, Any]:
        (pair,) = dual.generate(seeds=[1], **options)
        return json.loads(json.dumps(pair.recipe))

    draft = recipe(preset="draft", size=64)
    assert draft["preset"] == {"name": "draft", "gate": "not measured"}
    assert draft["calls"] == draft["sampling"]["steps"] == 10
    assert draft["sampling"]["scheduler"] == SOLVER
    # the values decide, not the name
    spelt = recipe(sampling=Sampling(**draft["sampling"]))
    assert spelt["preset"] is None
    assert differences(identity(draft), identity(spelt)) == []
    # PNDM visits one timestep twice
    plain = recipe(steps=3, size=64)
    assert (plain["calls"], plain["preset"]) == (4, None)


def test_an_older_recipe_matches_a_run_of_the_default(dual: Engine) -> None:
    (pair,) = dual.generate(seeds=[1], size=64, steps=2)
    older = {k: v for k, v in pair.recipe.items() if k not in ("calls", "preset")}
    assert set(older["sampling"]) == {"steps", "guidance", "scheduler", "height", "width"}
    assert differences(identity(pair.recipe), identity(older)) == []


def test_released_is_the_default_to_the_bit(dual: Engine) -> None:
    (plain,) = dual.generate(seeds=[1], size=64, steps=3, output_type="np")
    (named,) = dual.generate(seeds=[1], size=64, steps=3, preset="released", output_type="np")
    assert np.array_equal(plain.image, named.image)
    assert named.recipe["preset"] == {"name": "released"}
    assert differences(identity(plain.recipe), identity(named.recipe)) == []


def test_a_preset_beside_a_sampling_object_is_refused(dual: Engine) -> None:
    with pytest.raises(SettingsError, match="not both"):
        dual.stream(1, sampling=Sampling(steps=2), preset="fast")


def test_a_preset_replaces_the_sampling_of_the_demo() -> None:
    def chosen(**given: Any) -> dict[str, Any]:
        *_, options = filled_demo("washer/chip", None, None, None, {"sampling": Sampling(**given)})
        assert "steps" not in options
        size = {"scheduler": "PNDMScheduler", "size": (64, 64)}
        return options["sampling"].filled(background=False, **size).recorded()

    assert (chosen()["steps"], chosen()["guidance"]) == (25, 1.0)
    assert (chosen(steps=9)["steps"], chosen(steps=9)["guidance"]) == (9, 1.0)
    assert chosen(timesteps=[900, 100])["steps"] == 2
    assert (chosen(preset="fast")["steps"], chosen(preset="fast")["guidance"]) == (20, 2.5)
    assert chosen(preset="released")["scheduler"] == "PNDMScheduler"


def test_steps_are_not_calls() -> None:
    """The table in `docs/presets.md`."""
    base = BaseModel(DATA / "dual/model")

    def calls(name: str, **options: Any) -> int:
        scheduler = base.make_scheduler(name, options)
        scheduler.set_timesteps(20, device="cpu")
        return len(scheduler.timesteps)

    assert calls("PNDMScheduler", skip_prk=True) == 21
    assert calls("PNDMScheduler", skip_prk=False) == 29
    twice = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
    assert {calls(name) for name in twice} == {39}
    with pytest.raises(SettingsError) as caught:
        base.make_scheduler("none")
    offered = set(str(caught.value).partition("one of ")[2].split(", "))
    # that one needs another package
    rest = offered - twice - {"PNDMScheduler", "DPMSolverSDEScheduler"}
    assert len(rest) >= 9
    assert {name: calls(name) for name in rest} == dict.fromkeys(rest, 20)


def verdict(**values: Any) -> dict[str, Any]:
    chosen = filled(preset="fast")
    gates = {"distance": True, "quality": False, "downstream": None}
    row = {"gate": "failed", "gates": gates, "pairs": 60, "base": "b" * 64}
    return {**row, "sampling": chosen.recorded(), **values}


def test_a_verdict_is_kept_beside_the_adapter(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.touch()
    row = verdict()
    assert verdicts.keep(adapter, "a", {"fast": row}) == tmp_path / "presets.json"
    verdicts.keep(adapter, "other", {"fast": verdict(gate="passed")})
    assert verdicts.read(adapter, "a") == verdicts.read(tmp_path, "a") == {"fast": row}
    assert verdicts.read(adapter, "c") == {}
    expected = "failed on 60 pairs (distance passed, quality failed, downstream not measured)"
    assert verdicts.line(row) == expected


def test_a_verdict_counts_for_what_it_was_found_with(tmp_path: Path) -> None:
    verdicts.keep(tmp_path, "a", {"fast": verdict()})
    adapter, base = {"source": str(tmp_path), "sha256": "a"}, {"sha256": "b" * 64}

    def gate(chosen: ChosenSampling, base: dict[str, str] = base) -> str:
        found = verdicts.of_run(base, adapter, chosen)
        assert found is not None
        return found["gate"]

    assert gate(filled(preset="fast")) == "failed"
    for given in ({"steps": 19}, {"guidance": 1.0}, {"height": 128}):
        assert gate(filled(preset="fast", **given)) == "not measured"
    assert gate(filled(preset="draft")) == "not measured"
    placed = verdicts.of_run(base, adapter, filled(preset="fast"), placed=True)
    assert placed == {"name": "fast", "gate": "not measured"}
    assert gate(filled(preset="fast"), {"sha256": "other"}) == "not measured"
    assert verdicts.of_run(base, adapter, filled()) is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{", '{"a": []}', '{"a": {"fast": 1}}', "[" * 100_000, "null",
        '{"a": {"fast": {"gate": "passed"}}}',
        '{"a": {"fast": {"gate": "maybe", "gates": {}, "pairs": 1}}}',
        '{"a": {"fast": {"gate": "passed", "gates": {"x": [1]}, "pairs": 1}}}',
        " " * (1 << 20) + "{}",
    ],
)  # fmt: skip
def test_a_damaged_file_of_verdicts_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "presets.json").write_text(content)
    assert verdicts.read(tmp_path, "a") == {}


def test_presets_are_complete() -> None:
    for name, preset in PRESETS.items():
        chosen = Sampling(preset=name).filled(
            background=False, scheduler="PNDMScheduler", size=(64, 64),
            held_guidance=2.5 if name == "distilled" else None,
        )  # fmt: skip
        scheduler = BaseModel(DATA / "dual/model").make_scheduler(preset.scheduler, chosen.schedule)
        scheduler.set_timesteps(preset.steps or 100, device="cpu")
        assert len(scheduler.timesteps) == (preset.steps or 101)
