"""Counts and seeds as people pass them: Python's, NumPy's, PyTorch's, one or many."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from dualdiff_engine import Background, Engine, Sampling, SettingsError
from dualdiff_engine.settings import batch_of, max_batch_of, sampling_of, seeds_of, size_of

WHOLE = [np.int64, np.int32, np.uint8, np.int16, torch.tensor, np.array]
NOT_WHOLE: list[Any] = [
    *(True, False, np.bool_(True), torch.tensor(True), np.array(True), 2.0, np.float32(2), "2"),
    *(np.array(2.0), torch.tensor(2.0), b"2", 2j, object()),
]


@pytest.mark.parametrize("seeds", [7, np.int64(7), np.array(7), torch.tensor(7), [7], (7,)])
def test_one_seed_may_stand_alone(seeds: Any) -> None:
    assert seeds_of(None, seeds, None) == (7,)


@pytest.mark.parametrize(
    "seeds",
    [range(3), [0, 1, 2], np.arange(3), np.arange(3, dtype=np.uint8), torch.arange(3), (0, 1, 2)],
)
def test_seeds_in_any_list(seeds: Any) -> None:
    for chosen in (seeds_of(None, seeds, None), seeds_of(seeds, None, None)):
        assert chosen == (0, 1, 2)
        assert {type(seed) for seed in chosen} == {int}


@pytest.mark.parametrize(
    "seeds",
    ["7", b"7", 7.0, True, np.array([7.0]), [True], [[7]], np.array([[7]]), {7: 8}, -1, [2**63]],
)
def test_what_is_not_a_seed(seeds: Any) -> None:
    with pytest.raises(SettingsError, match="seed must be"):
        seeds_of(None, seeds, None)


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_numbers_of_other_libraries(kind: Any) -> None:
    assert len(seeds_of(kind(3), None, None)) == 3
    assert seeds_of(kind(1), [5], None) == (5,)
    assert batch_of(kind(2), 4, 8) == 2
    assert max_batch_of(kind(2)) == 2
    assert size_of(kind(64)) == (64, 64)
    assert size_of((kind(64), kind(72))) == (64, 72)
    sampling = Sampling(steps=kind(20), height=kind(64), width=kind(72))
    assert json.loads(json.dumps(asdict(sampling)))["steps"] == 20
    assert type(Background(None, noise_seed=kind(3)).noise_seed) is int


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: type(value).__name__)
def test_what_is_not_a_whole_number(value: Any) -> None:
    calls: dict[str, Any] = {
        "n must be": lambda: seeds_of(value, None, None),
        "steps must be": lambda: Sampling(steps=value),
        "height must be": lambda: Sampling(height=value),
        "size must be": lambda: sampling_of(None, size=value),
        "batch must be": lambda: batch_of(value, 4, 8),
        "max_batch must be": lambda: max_batch_of(value),
        "noise_seed must be": lambda: Background(None, noise_seed=value),
    }
    for message, call in calls.items():
        with pytest.raises(SettingsError, match=message):
            call()


@pytest.mark.parametrize(
    "value", [2, 2.5, np.float32(2.5), np.float64(2.5), np.float16(2), np.int64(2)]
)
def test_guidance_of_other_libraries(value: Any) -> None:
    guidance = Sampling(guidance=value).guidance
    assert guidance == float(value)
    assert type(guidance) is float


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), "2", float("nan"), np.float32("inf"), 10**400, 2j, [2.0]]
)
def test_what_is_not_a_guidance(value: Any) -> None:
    with pytest.raises(SettingsError, match="guidance must be a finite number"):
        Sampling(guidance=value)


def test_a_pair_asked_for_with_numpy(dual: Engine) -> None:
    (pair,) = dual.generate(
        seeds=np.int64(7),
        batch=np.int32(1),
        steps=np.int64(2),
        size=np.array([64, 72]),
        guidance=np.float32(2.5),
    )
    (same,) = dual.generate(seeds=[7], batch=1, steps=2, size=(64, 72), guidance=2.5)
    assert pair.image.tobytes() == same.image.tobytes()
    assert json.dumps(pair.recipe) == json.dumps(same.recipe)
