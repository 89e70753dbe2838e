"""The gate of presets finds what is planted, its command resumes, and its verdict is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine import Engine, Sampling, cli
from dualdiff_engine.cli import preset as command
from dualdiff_engine.errors import DataError
from dualdiff_engine.evaluation import preset_gate, quality
from dualdiff_engine.evaluation.data import find_pairs
from dualdiff_engine.evaluation.preset_pairs import Drawn, Subject, draw, samplings
from dualdiff_engine.settings import Prompts
from evaluation_cases import blobs, good, write_real, write_run
from support import DATA

DUAL = DATA / "dual"
COUNT = 8


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, Drawn]:
    """Three samplings with the same pictures; released latents are a tenth off, others less."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((COUNT, 2, 4, 8, 8)).astype(np.float32)
    found = {}
    for name, off in (("converged", 0.0), ("released", 0.1), ("fast", 0.05)):
        samples = find_pairs(write_run(tmp_path / name, blobs(COUNT, 0, 64)))
        found[name] = Drawn(samples, latents * np.float32(1 + off))
    return found


def judged(arms: dict[str, Drawn]) -> dict[str, Any]:
    found = preset_gate.compare(arms, ["fast"])
    return preset_gate.verdict(preset_gate.checks(found["fast"], found["released"]))


def failed(arms: dict[str, Drawn]) -> set[str]:
    return {check["name"] for check in judged(arms)["checks"] if check["passed"] is False}


def repaint(drawn: Drawn, kind: str, change: Any, count: int = COUNT) -> None:
    for sample in drawn.samples[:count]:
        path = getattr(sample, kind)
        pixels = np.array(Image.open(path))
        change(pixels)
        Image.fromarray(pixels).save(path)


def test_the_same_pictures_pass(arms: dict[str, Drawn]) -> None:
    found = judged(arms)
    assert found["gate"] == "passed"
    assert found["gates"] == {"distance": True, "quality": True, "downstream": None}
    assert {check["passed"] for check in found["checks"]} == {True}
    assert "| distance | latent distance to converged | 0.05 |" in preset_gate.table(found)


def test_a_distance_is_relative_and_of_the_mean(arms: dict[str, Drawn]) -> None:
    near = preset_gate.nearness(arms["released"], arms["converged"])
    assert near["distance"] == pytest.approx(0.1, rel=1e-6)
    assert (near["overlap_median"], near["overlap_poor"]) == (1.0, 0.0)


def test_latents_further_off_than_released_fail(arms: dict[str, Drawn]) -> None:
    arms["fast"] = Drawn(arms["fast"].samples, arms["converged"].latents * np.float32(1.11))
    assert failed(arms) == {"latent distance to converged"}


def test_a_leak_fails(arms: dict[str, Drawn]) -> None:
    def leak(level: int) -> Any:
        def change(pixels: np.ndarray) -> None:
            pixels[0] = level

        return change

    repaint(arms["released"], "anomaly", leak(20))
    repaint(arms["fast"], "anomaly", leak(29))
    assert failed(arms) == set()
    repaint(arms["fast"], "anomaly", leak(31))
    assert failed(arms) == {"leakage outside"}


def test_a_lost_mask_fails(arms: dict[str, Drawn]) -> None:
    def clear(pixels: np.ndarray) -> None:
        pixels[:] = 0

    repaint(arms["fast"], "mask", clear, 1)
    # one of eight is more than 7 %
    assert {"masks that overlap less than 0.8", "new empty masks"} < failed(arms)
    # not new: the released sampler lost it, too
    repaint(arms["released"], "mask", clear, 1)
    assert preset_gate.new_empty(arms["fast"], arms["released"]) == 0


def test_grown_masks_and_equal_pictures_fail(arms: dict[str, Drawn]) -> None:
    def whole(pixels: np.ndarray) -> None:
        pixels[:] = 255

    repaint(arms["fast"], "mask", whole)
    assert {"area", "overlap of masks, median"} <= failed(arms)
    first = np.array(Image.open(arms["released"].samples[0].image))

    def same(pixels: np.ndarray) -> None:
        pixels[:] = first

    repaint(arms["fast"], "image", same)
    assert "diversity image" in failed(arms)


def test_errors_are_those_of_the_means(arms: dict[str, Drawn]) -> None:
    samples = arms["released"].samples
    found = preset_gate.measured(samples)
    whole = quality.measure(samples)
    assert found["area"]["value"] == pytest.approx(whole["masks"]["area"]["mean"])
    assert found["diversity_mask"]["value"] == whole["diversity"]["mask"]
    areas = [sample.flags().mean() for sample in samples]
    assert found["area"]["error"] == pytest.approx(np.std(areas, ddof=1) / COUNT**0.5)
    # of a mean, the jackknife gives the same
    mean = np.mean(areas)
    without = [float((mean * COUNT - area) / (COUNT - 1)) for area in areas]
    assert preset_gate._jackknife(without) == pytest.approx(found["area"]["error"])


def test_downstream_allows_a_deviation() -> None:
    arms = {
        name: {"mean": {"pixel_ap": mean}, "spread": {"pixel_ap": 0.02}}
        for name, mean in (("released", 0.9), ("fast", 0.881), ("draft", 0.879))
    }
    checks = {n: preset_gate.downstream_check({"arms": arms}, n) for n in ("fast", "draft")}
    assert [check.passed for check in checks.values()] == [True, False]
    assert preset_gate.verdict([checks["draft"]])["gate"] == "failed"


def test_the_released_arm_is_its_sampler_whatever_the_base_has() -> None:
    chosen = samplings(["fast"], None, 12)
    assert list(chosen) == ["converged", "released", "fast"]
    filled = {
        name: sampling.filled(background=False, scheduler="DDIMScheduler", size=(64, 64))
        for name, sampling in chosen.items()
    }
    assert (filled["released"].scheduler, filled["released"].steps) == ("PNDMScheduler", 100)
    assert (filled["converged"].steps, filled["fast"].steps) == (12, 20)


def test_latents_belong_to_their_pairs_and_runs_are_continued(dual: Engine, tmp_path: Path) -> None:
    subject, sampling = Subject(Prompts()), Sampling(steps=2, height=64, width=64)
    drawn = draw(dual, subject, sampling, tmp_path, 3)
    assert drawn is not None
    # decoded, they are the pictures on the disk
    for seed in range(3):
        kept = []
        dual.generate(
            seeds=[seed], sampling=sampling,
            callback_on_step_end=lambda *a: kept.append(a[3]["latents"].clone()),  # noqa: B023
        )  # fmt: skip
        assert np.abs(drawn.latents[seed] - kept[-1][0].numpy()).max() < 1e-4
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    more = draw(dual, subject, sampling, tmp_path, 5)
    assert more is not None
    assert np.array_equal(more.latents[:3], drawn.latents)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (folder,) = tmp_path.iterdir()
    (folder / "latents" / "00001.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"latents is damaged .*: remove "):
        draw(dual, subject, sampling, tmp_path, 5)


def test_an_interrupted_run_says_so(dual: Engine, tmp_path: Path) -> None:
    sampling = Sampling(steps=2, height=64, width=64)
    assert draw(dual, Subject(Prompts()), sampling, tmp_path, 2, stopped=lambda: True) is None


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_the_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "STEPS", 2)
    adapter = tmp_path / "adapter.safetensors"
    assert run("convert", DUAL / "adapter", adapter) == 0
    real = write_real(tmp_path / "real", blobs(12, 1, 64), good(4, 0, 64))
    record = tmp_path / "record.json"
    options = ("--base", DUAL / "model", "--adapter", adapter, "--work", tmp_path / "work")
    given = ("--preset", "draft", "--pairs", 3, "--reference-steps", 6, "--output", record)
    learn = ("--downstream", "--real", real, "--defect", "dent")
    capfd.readouterr()
    code = run("eval", "preset", *options, *given, *learn, "--keep")
    said = capfd.readouterr()
    found = json.loads(record.read_text("utf-8"))
    verdict = found["presets"]["draft"]
    assert code == (1 if verdict["gate"] == "failed" else 0)
    assert f"preset draft: {verdict['gate']} on 3 pairs (distance" in said.out
    assert "released: 3 pairs of 101 denoiser calls" in said.err
    assert set(found["downstream"]["arms"]) == {"released", "draft"}
    assert verdict["gates"]["downstream"] is not None
    assert {name: row["calls"] for name, row in found["samplings"].items()} == {
        **{"converged": 6, "released": 101, "draft": 10},
    }
    # what was drawn is not drawn again
    shutil.rmtree(real)
    assert run("eval", "preset", *options, *given, "--quiet") in (0, 1)
    # and what was found is known where the adapter is used
    assert run("inspect", adapter) == 0
    assert f"preset draft         {verdict['gate']} on 3 pairs" in capfd.readouterr().out
    out = tmp_path / "out"
    assert run("generate", *options[:4], "--preset", "draft", "--out", out, "--quiet") == 0
    recipe = json.loads((out / "manifest.jsonl").read_text("utf-8"))["recipe"]
    assert recipe["preset"] == {"name": "draft", "gate": verdict["gate"]}
    assert recipe["calls"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--preset quick --demo tile/chip", "no preset 'quick': choose one of"),
        ("--preset released --demo tile/chip", "released is what others are compared with"),
        ("", "pass --base and --adapter"),
        ("--demo tile/chip --base x", "--demo already selects base and adapter"),
        ("--demo tile/chip --reference-steps 0", "steps must be a whole number from 1"),
        ("--demo tile/chip --pairs 2", "--pairs"),
        ("--demo tile/chip --out no/such/folder/r.json", "cannot be written"),
        ("--base x --adapter y --downstream", "--downstream needs --real"),
        ("--base x --adapter y --object-mask {mask}", "--object-mask needs --background"),
        ("--demo tile/chip --background {mask}", "--demo already selects the background"),
    ],
)
def test_wrong_arguments(
    options: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (8, 8)).save(mask)
    work = ("--work", tmp_path / "work")
    assert run("eval", "preset", *options.format(mask=mask).split(), *work) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "work").exists()
