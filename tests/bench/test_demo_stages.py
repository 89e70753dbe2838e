"""The stages of the demo, on two pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dualdiff_engine.bench import demo_stages
from dualdiff_engine.demo.factory import make
from dualdiff_engine.demo.presets import find
from dualdiff_engine.evaluation import tasks
from dualdiff_engine.evaluation.downstream import Material
from dualdiff_engine.evaluation.tasks import CEILING_SEED

SIZE = 64


@pytest.fixture(scope="module")
def arms() -> dict[str, Material]:
    preset = find("washer/chip")
    products = [make("washer", "chip", seed=CEILING_SEED + n) for n in range(2)]
    return {name: arm(preset, products, SIZE) for name, arm in demo_stages.ARMS.items()}


def test_each_stage_is_farther_from_the_real_pictures(arms: dict[str, Material]) -> None:
    real = arms[demo_stages.UNTOUCHED].images.astype(float)
    away = [np.abs(material.images - real).mean() for material in arms.values()]
    assert away[0] == 0 < away[1] < away[2] < away[3]


def test_the_way_through_the_autoencoder_keeps_the_masks(arms: dict[str, Material]) -> None:
    real, back = arms[demo_stages.UNTOUCHED], arms[demo_stages.ROUND_TRIP]
    assert real.masks.any()
    assert np.array_equal(real.masks, back.masks)


def test_half_of_the_schedule_keeps_the_defect_in_its_place(arms: dict[str, Material]) -> None:
    real, half = arms[demo_stages.UNTOUCHED].masks, arms[demo_stages.HALF].masks
    assert (real & half).sum() > 0.3 * (real | half).sum()


def test_a_record_is_added_to_and_not_measured_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "GOOD", 3)
    monkeypatch.setattr(tasks, "TEST", 3)
    given = ["--out", str(tmp_path), "--count", "2", "--steps", "1", "--seeds", "0"]
    chosen = ["--arms", "untouched", "round trip"]
    for _ in range(2):
        demo_stages.main([*given, *chosen, "--only", "washer/chip"])
    written = json.loads((tmp_path / demo_stages.FILE).read_text())
    assert list(written["tasks"]["washer/chip"]["arms"]) == ["untouched", "round trip"]
    # one network per arm, in the first call only
    assert capsys.readouterr().out.count("seed 0: AP") == 2
