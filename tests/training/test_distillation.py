"""Distilled guidance: what is learnt, what the file says, and how the engine draws with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualdiff_engine import Engine, Sampling, adapters
from dualdiff_engine.adapters import Distilled
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.cli import main
from dualdiff_engine.errors import AdapterError, SettingsError
from dualdiff_engine.settings import Background, Prompts
from dualdiff_engine.training import TrainingOptions, TrainingResult, train_adapter
from dualdiff_engine.training.data import find_examples
from dualdiff_engine.training.distillation import (
    GuidedCalls,
    Teacher,
    guided_calls,
    spread,
    weights,
)
from dualdiff_engine.training.latents import encode, generator_of
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.state import STATE
from dualdiff_engine.training.trainer import ADAPTER
from support import DATA
from training_cases import DEFECT, SIZE, base_of, mask_of, picture_of, write_data

GUIDANCE = 3.0
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    """Unlike elsewhere, gradients are wanted."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The golden adapters by whether they have a background, as .safetensors."""
    folder = tmp_path_factory.mktemp("teachers")
    found = {}
    for background, name in ((False, "dual"), (True, "bcm")):
        found[background] = folder / f"{name}.safetensors"
        adapters.convert(DATA / name / "adapter", found[background])
    return found


def distilling(**changes: Any) -> TrainingOptions:
    few = {"distill_guidance": GUIDANCE, "trajectories": 5, "trajectory_calls": 4}
    options: dict[str, Any] = {**few, "learning_rate": 1e-3, "weight_decay": 0.0, **changes}
    small = {"rank": 4, "size": SIZE, "batch": 2, "sample_every": 0}
    return TrainingOptions(**{**small, **options})


def distil(teacher: Path, out: Path, **changes: Any) -> TrainingResult:
    stop = changes.pop("should_stop", lambda: False)
    return train_adapter(
        base_of(False), None, out, distilling(**changes), teacher=teacher, should_stop=stop
    )


@pytest.fixture(scope="module")
def distilled(teachers: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = distil(teachers[False], tmp_path_factory.mktemp("distilled"), steps=2).adapter
    assert found is not None
    return found


@pytest.fixture
def engine(distilled: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(base_of(False), adapter=distilled, device="cpu") as engine:
        yield engine


# --- what is learnt ---------------------------------------------------------------------------


def lessons(
    teacher: Teacher, data: Path, background: bool
) -> tuple[TrainingOptions, GuidedCalls, torch.Tensor]:
    base, options, around = BaseModel(base_of(background)), teacher.options(distilling()), None
    if background:
        named = replace(options, defect=DEFECT)
        vae = base.load_vae(CPU, torch.float32)
        around = encode(vae, find_examples(data, named), named, SIZE)
    return options, *guided_calls(base, teacher, options, SIZE, CPU, around)


def test_targets_are_the_teachers_guided_predictions(
    teachers: dict[bool, Path], data: Path
) -> None:
    """Every example is what the engine predicts with guidance, to the bit."""
    _, calls, context = lessons(Teacher.open(teachers[False], GUIDANCE), data, False)
    assert calls.latents.shape == calls.guided.shape == (5 * 4, 2, 4, 8, 8)
    assert calls.timesteps.tolist()[:4] == [999] * 4
    prompts = Prompts(distilling().image_prompt, distilling().anomaly_prompt)
    with Engine.from_pretrained(
        base_of(False), adapter=teachers[False], device="cpu", dtype="float32", tune="never"
    ) as engine:
        both = engine.encode_prompts(prompts)
        assert torch.equal(context, both[:, 1:])
        for first in (4, 17):
            # four pairs were drawn together, then the fifth
            group = calls.at(slice(first, first + (4 if first < 16 else 1)))
            read = group.latents.transpose(0, 1).unsqueeze(1)
            predicted = engine.predict_noise(read, float(group.timesteps[0]), both)
            expected = engine.ops.guided_step(predicted, GUIDANCE)
            assert torch.equal(group.guided.transpose(0, 1), expected)
            unconditional, conditional = predicted.double().unbind(1)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            # a difference, a product and a sum in fp32
            bound = 4 * torch.finfo(torch.float32).eps * (1 + 2 * GUIDANCE)
            assert float((expected - guided).abs().max()) < bound * float(predicted.abs().max())


@pytest.mark.parametrize("background", [False, True])
def test_training_starts_at_the_teacher(
    teachers: dict[bool, Path], data: Path, background: bool
) -> None:
    """At guidance 1 there would be nothing to learn: both networks are one, up to rounding."""
    teacher = replace(Teacher.open(teachers[background], GUIDANCE), guidance=1.0)
    options, calls, context = lessons(teacher, data, background)
    network = TrainableNetwork(BaseModel(base_of(background)), options, CPU, torch.float32)
    network.start_at(teacher.adapter)
    with torch.no_grad():
        errors = calls.errors(network, context)
    # the engine folds: 1e-6 of a prediction of size one
    assert float(errors.max()) < 1e-10 * float(calls.guided.square().mean())
    assert (calls.background is not None) == background


def test_the_error_falls_by_a_quarter_and_more(teachers: dict[bool, Path]) -> None:
    """On pairs that the training did not see."""
    base, teacher = BaseModel(base_of(False)), Teacher.open(teachers[False], GUIDANCE)
    options = teacher.options(distilling(trajectories=8))
    calls, context = guided_calls(base, teacher, options, SIZE, CPU)
    others, _ = guided_calls(base, teacher, replace(options, seed=7, trajectories=2), SIZE, CPU)
    network = TrainableNetwork(base, options, CPU, torch.float32)
    network.start_at(teacher.adapter)
    optimizer = torch.optim.AdamW(network.parameters.values(), lr=5e-3, weight_decay=0)

    def left() -> float:
        with torch.no_grad():
            return float(others.errors(network, context).mean())

    before = left()
    for step in range(20):
        calls.draw(replace(options, batch=4), step).errors(network, context).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert left() < 0.75 * before


def test_timesteps_cover_the_schedule() -> None:
    for calls in (2, 7, 25, 1000):
        times = spread(calls, 1000, generator_of(0, "x"))
        assert times[0] == 999
        for part, time in enumerate(times[1:], 1):
            place = 999 - time
            assert part * 1000 // calls <= place < (part + 1) * 1000 // calls
    assert spread(7, 1000, generator_of(0, "x")) != spread(7, 1000, generator_of(1, "x"))


def test_an_error_counts_as_one_of_the_velocity() -> None:
    noiser = BaseModel(base_of(False)).noiser()
    assert noiser.config.prediction_type == "epsilon"
    counted = weights(noiser)
    assert float(counted.mean()) == pytest.approx(1)
    expected = noiser.alphas_cumprod[100] / noiser.alphas_cumprod[900]
    assert float(counted[900] / counted[100]) == pytest.approx(float(expected), rel=1e-4)


# --- runs -------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_bit_for_bit(teachers: dict[bool, Path], tmp_path: Path) -> None:
    whole = distil(teachers[False], tmp_path / "whole", steps=2, trajectories=2)
    stopped = distil(
        teachers[False], tmp_path / "parts", steps=2, trajectories=2, should_stop=lambda: True
    )
    assert stopped.adapter is None
    again = distil(teachers[False], tmp_path / "parts", steps=2, trajectories=2)
    assert torch.equal(whole.losses, again.losses)
    first, second = tmp_path / "whole", tmp_path / "parts"
    assert (first / ADAPTER).read_bytes() == (second / ADAPTER).read_bytes()
    assert load_file(first / STATE).keys() == load_file(second / STATE).keys()
    with pytest.raises(SettingsError, match="another distill_guidance"):
        distil(teachers[False], first, steps=2, trajectories=2, distill_guidance=2.0)


def test_a_run_of_another_teacher_is_refused(
    teachers: dict[bool, Path], distilled: Path, tmp_path: Path
) -> None:
    tensors = load_file(teachers[False])
    name = next(iter(tensors))
    other = tmp_path / "other.safetensors"
    save_file({**tensors, name: tensors[name] + 1}, other)
    with pytest.raises(SettingsError, match="another teacher"):
        distil(other, distilled.parent, steps=2)


def test_the_file_has_the_teachers_names_and_says_what_it_is(
    teachers: dict[bool, Path], distilled: Path, tmp_path: Path
) -> None:
    teacher = adapters.load(teachers[False])
    expected = Distilled(GUIDANCE, teacher.sha256, 2)
    loaded = adapters.load(distilled)
    assert (loaded.distilled, loaded.window) == (expected, None)
    ours, theirs = load_file(distilled), load_file(teachers[False])
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    # not trained
    text = [name for name in ours if name.startswith("text_encoder.")]
    assert text
    assert all(torch.equal(ours[name], theirs[name].float()) for name in text)
    assert adapters.convert(distilled, tmp_path / "same.safetensors").distilled == expected
    assert adapters.AdapterSummary.of(
        json.loads(json.dumps({**vars(adapters.summary(loaded)), "distilled": vars(expected)}))
    ) == adapters.summary(loaded)
    record = json.loads((distilled.parent / "training.json").read_text())
    assert record["teacher"]["sha256"] == teacher.sha256
    assert record["options"]["distill_guidance"] == GUIDANCE


def test_a_background_adapter_learns_with_surroundings(
    teachers: dict[bool, Path], data: Path, tmp_path: Path
) -> None:
    options = distilling(steps=2, defect=DEFECT, trajectories=2, trajectory_calls=2)
    result = train_adapter(base_of(True), data, tmp_path, options, teacher=teachers[True])
    assert result.adapter is not None
    loaded = adapters.load(result.adapter)
    assert loaded.has_background
    assert loaded.distilled is not None
    with Engine.from_pretrained(base_of(True), adapter=result.adapter, device="cpu") as engine:
        around = Background(picture_of(data, 0), mask_of(data, 0, "object_mask"))
        (pair,) = engine.generate(seeds=[1], steps=2, size=SIZE, background=around)
    assert pair.recipe["sampling"]["guidance"] == 1.0


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no teacher": ({}, {"teacher": None}, "go together"),
    "no guidance": ({"distill_guidance": None, "defect": DEFECT}, {}, "go together"),
    "guidance of 1": ({"distill_guidance": 1}, {}, "distill_guidance must be a number from 1"),
    "one call": ({"trajectory_calls": 1}, {}, "trajectory_calls must be a whole number from 2"),
    "pictures": ({"defect": DEFECT}, {"data": "."}, "leave out data and defect"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, teachers: dict[bool, Path], tmp_path: Path) -> None:
    changes, given, message = BAD[case]
    arguments = {"data": None, "teacher": teachers[False], **given}
    with pytest.raises(SettingsError, match=message):
        train_adapter(
            base_of(False), arguments["data"], tmp_path, distilling(**changes),
            teacher=arguments["teacher"],
        )  # fmt: skip


def test_bad_teachers(teachers: dict[bool, Path], distilled: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds guidance already .*distil from its teacher"):
        distil(distilled, tmp_path / "twice", steps=1)
    with pytest.raises(AdapterError, match="another base model"):
        train_adapter(
            DATA.parents[1] / "dualdiff_engine/demo/model/base", None, tmp_path / "base",
            distilling(), teacher=teachers[False],
        )  # fmt: skip
    with pytest.raises(SettingsError, match="surroundings"):
        train_adapter(base_of(True), None, tmp_path / "bare", distilling(), teacher=teachers[True])


# --- the engine -------------------------------------------------------------------------------


def rows_of(engine: Engine, **options: Any) -> set[tuple[int, ...]]:
    """(branches, rows) of the noises that the denoiser hands out while a pair is drawn."""
    seen, denoiser = set(), engine.denoiser

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(denoiser, name)

        def __call__(self, *inputs: Any) -> torch.Tensor:
            noise = denoiser(*inputs)
            seen.add(tuple(noise.shape[:2]))
            return noise

    engine.denoiser = Counting()
    try:
        engine.generate(seeds=[3], size=SIZE, **options)
    finally:
        engine.denoiser = denoiser
    return seen


def test_no_unconditional_rows(engine: Engine, teachers: dict[bool, Path]) -> None:
    assert rows_of(engine, steps=2) == {(2, 1)}
    assert rows_of(engine, preset="draft", steps=2) == {(2, 1)}
    assert rows_of(engine, guidance=1.0, steps=2) == {(2, 1)}
    engine.load_adapter(teachers[False])
    assert rows_of(engine, steps=2) == {(2, 2)}


def test_the_preset(engine: Engine, teachers: dict[bool, Path]) -> None:
    (pair,) = engine.generate(seeds=[3], preset="distilled", size=SIZE)
    recipe = pair.recipe
    assert (recipe["calls"], recipe["sampling"]["guidance"]) == (20, 1.0)
    assert recipe["adapter"]["guidance"] == GUIDANCE
    assert recipe["preset"] == {"name": "distilled", "gate": "not measured"}
    engine.load_adapter(teachers[False])
    with pytest.raises(SettingsError, match="preset distilled needs an adapter that holds"):
        engine.stream(1, preset="distilled")


@pytest.mark.parametrize("guidance", [0.0, 2.5, GUIDANCE])
def test_another_guidance_is_refused(engine: Engine, guidance: float) -> None:
    message = rf"holds guidance 3 and takes no other, got {guidance:g}: leave out guidance"
    with pytest.raises(SettingsError, match=message):
        engine.stream(1, guidance=guidance)
    with pytest.raises(SettingsError, match=message):
        engine.stream(1, sampling=Sampling(preset="distilled", guidance=guidance))


@pytest.mark.parametrize(
    "value",
    [
        "", "{", "[]", "3", "[" * 100_000, "null", '{"guidance": 3}',
        '{"guidance": true, "steps": 2, "teacher": "' + "a" * 64 + '"}',
        '{"guidance": NaN, "steps": 2, "teacher": "' + "a" * 64 + '"}',
        '{"guidance": 3, "steps": -1, "teacher": "' + "a" * 64 + '"}',
        '{"guidance": 3, "steps": 2, "teacher": "../x"}',
    ],
)  # fmt: skip
def test_a_file_that_does_not_say_which_guidance(
    distilled: Path, tmp_path: Path, value: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(load_file(distilled), path, {"dualdiff_distilled": value})
    with pytest.raises(AdapterError, match=r"holds guidance, but not which .*use its teacher"):
        adapters.load(path)


def test_a_window_is_kept_beside(distilled: Path, tmp_path: Path) -> None:
    told = Distilled(2.0, "a" * 64, 9)
    path = tmp_path / "a.safetensors"
    adapters.files.write(path, load_file(distilled), adapters.files.Origin(2.5, told))
    loaded = adapters.load(path)
    assert (loaded.window, loaded.distilled) == (2.5, told)


# --- the command line -------------------------------------------------------------------------


def test_commands(teachers: dict[bool, Path], distilled: Path, tmp_path: Path, capsys: Any) -> None:
    base, out = str(base_of(False)), str(tmp_path / "run")
    taught = ["train", "--base", base, "--from", str(teachers[False]), "--out", out, "--quiet"]
    small = ["--steps", "1", "--size", str(SIZE), "--sample-every", "0"]
    small += ["--trajectories", "1", "--trajectory-calls", "2", "--batch", "1"]
    assert main([*taught, *small, "--distill-guidance", "2"]) == 0
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^distilled +guidance 2, of [0-9a-f]{12}… in 1 steps$", shown, re.MULTILINE)
    assert re.search(r"^preset distilled +not measured$", shown, re.MULTILINE)
    assert "preset fast" not in shown
    assert main([*taught, *small, "--distill-guidance", "2", "--rank", "8"]) == 2
    assert "--rank is that of --from" in capsys.readouterr().err
    assert main(["train", "--base", base, "--out", out]) == 2
    assert "pass --data and --defect, or --from" in capsys.readouterr().err


def test_the_gate_compares_with_the_teacher(
    teachers: dict[bool, Path], distilled: Path, tmp_path: Path, capsys: Any
) -> None:
    command = ["eval", "preset", "--base", str(base_of(False)), "--adapter", str(distilled)]
    command += ["--work", str(tmp_path / "work"), "--pairs", "3", "--reference-steps", "3"]
    assert main(command) == 2
    assert "pass --teacher ADAPTER" in capsys.readouterr().err
    assert main([*command, "--teacher", str(distilled)]) == 2
    assert "is not the adapter that" in capsys.readouterr().err
    assert main([*command, "--guidance", "2"]) == 2
    assert "takes no other" in capsys.readouterr().err
    ordinary = [*command[:4], "--adapter", str(teachers[False]), *command[6:]]
    assert main([*ordinary, "--preset", "distilled"]) == 2
    assert "needs an adapter that holds guidance" in capsys.readouterr().err


def test_the_record_of_the_gate(
    teachers: dict[bool, Path], distilled: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from dualdiff_engine.evaluation import preset_pairs

    short = Sampling(scheduler="PNDMScheduler", spacing="leading", skip_prk=True, steps=3)
    monkeypatch.setattr(preset_pairs, "RELEASED_SAMPLING", short)
    out = tmp_path / "record.json"
    command = ["eval", "preset", "--base", str(base_of(False)), "--adapter", str(distilled)]
    command += ["--teacher", str(teachers[False]), "--work", str(tmp_path / "work"), "--quiet"]
    assert main([*command, "--pairs", "3", "--reference-steps", "3", "--out", str(out)]) in (0, 1)
    record = json.loads(out.read_text())
    assert record["adapter"]["sha256"] == adapters.load(distilled).sha256
    assert record["teacher"] == adapters.load(teachers[False]).sha256
    guidances = {n: row["sampling"]["guidance"] for n, row in record["samplings"].items()}
    assert guidances == {"converged": GUIDANCE, "released": GUIDANCE, "distilled": 1.0}
    # of the teacher, whose sampling it is
    assert record["samplings"]["distilled"]["nearness"]["distance"] > 0
    manifest = next((tmp_path / "work").rglob("PNDM*/manifest.jsonl")).read_text()
    assert json.loads(manifest.splitlines()[0])["recipe"]["adapter"]["sha256"] == record["teacher"]
