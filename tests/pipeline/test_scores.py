"""Masks that tell the truth: scores of a pair, masks cut to the visible change, drawing again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualdiff_engine import Engine, Placement, RegionStatistics, SettingsError
from dualdiff_engine.folder_writer import MANIFEST, FolderWriter
from dualdiff_engine.pipeline.masks import extract_mask
from dualdiff_engine.pipeline.scores import (
    DEFAULT_ACCEPT,
    SCORES,
    Acceptance,
    attempt_seed,
    cut_to_change,
    scores_of,
)

QUICK: dict[str, Any] = {"steps": 2, "size": 64}
SIDE = 128


def square(top: int, left: int, side: int, level: int = 200) -> np.ndarray:
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    picture[top : top + side, left : left + side] = level
    return picture


def own(seed: int = 0) -> Placement:
    picture = np.random.default_rng(seed).integers(1, 255, (64, 64, 3), dtype=np.uint8)
    region = np.zeros((64, 64), np.uint8)
    region[16:48, 16:48] = 255
    return Placement(picture, region, edge=1)


def pixels(pair: Any) -> np.ndarray:
    return np.stack([np.asarray(pair.image), np.asarray(pair.anomaly)]).astype(int)


def test_scores_of_a_known_change() -> None:
    """A defect of 30 x 30 changed by 100 levels, half of it in the mask, and real masks of 900."""
    change = square(20, 20, 30, 100)
    mask = (square(20, 20, 30)[..., 0] > 0) & (np.arange(SIDE) < 35)
    image = square(20, 20, 30, 180)
    real = RegionStatistics(((900 / SIDE**2, 1.0), (300 / SIDE**2, 1.0)), (1, 1))
    scores = scores_of(image, square(20, 20, 30, 129), mask.astype(np.uint8) * 255, change, real)
    assert scores["area"] == pytest.approx(450 / SIDE**2)
    assert scores["branch_difference"] == pytest.approx(51 / 255)
    assert scores["change_inside"] == pytest.approx(100 / 255)
    # two pixels of margin: 17 of 30 columns are in the mask or next to it
    assert scores["change_share"] == pytest.approx(17 / 30)
    outside = 13 * 30 * 100 / 255 / (SIDE**2 - 34 * 19)
    assert scores["change_outside"] == pytest.approx(outside)
    assert scores["area_ratio"] == pytest.approx(450 / 600)
    json.dumps(scores)


def test_scores_that_cannot_be_known_are_none() -> None:
    nothing = np.zeros((SIDE, SIDE), np.uint8)
    scores = scores_of(square(0, 0, 9), square(0, 0, 9), nothing)
    assert scores == {**dict.fromkeys(SCORES), "area": 0.0}
    still = scores_of(square(0, 0, 9), square(0, 0, 9), nothing, square(0, 0, 0))
    assert still["change_share"] is None
    assert still["change_outside"] == 0.0


def test_masks_by_their_source() -> None:
    """The anomaly picture shows two defects, of which the image shows one, and another."""
    anomaly = extract_mask(np.maximum(square(10, 10, 20), square(80, 80, 20)))
    change = np.maximum(square(10, 10, 20, 90), square(10, 90, 20, 90))
    first, second, third = (
        (square(*where, 20)[..., 0] > 0) for where in ((10, 10), (80, 80), (10, 90))
    )
    assert cut_to_change(anomaly, change, "anomaly") is anomaly
    by_change = cut_to_change(anomaly, change, "change")
    both = cut_to_change(anomaly, change, "both")
    for result, white, black in (
        (by_change, first | third, second),
        (both, first, second | third),
    ):
        assert (result.mask[white] > 0).mean() > 0.95
        assert not result.mask[black].any()
        assert result.area == np.mean(result.mask > 0)
        assert not result.empty
    assert cut_to_change(anomaly, square(0, 0, 0), "both").empty


@pytest.mark.parametrize("source", ["anomaly", "change", "both"])
def test_masks_of_placed_pairs(dual: Engine, source: str) -> None:
    (pair,) = dual.generate(seeds=[3], placement=own(), mask=source, **QUICK)
    assert pair.recipe["mask_source"] == source
    outside = np.asarray(pair.region) == 0
    # the edge is one latent pixel
    outside[8:56, 8:56] = False
    assert not np.asarray(pair.mask)[outside].any()
    # an untrained network changes all of the region
    assert pair.scores["area"] > 0.1
    assert pair.scores["change_inside"] > 0.05
    assert pair.scores["change_outside"] < pair.scores["change_inside"]
    assert pair.accepted is None


def test_pairs_without_a_placement_have_what_can_be_known(dual: Engine) -> None:
    (pair,) = dual.generate(seeds=[3], **QUICK)
    known = {name for name, value in pair.scores.items() if value is not None}
    assert known <= {"area", "branch_difference"}
    assert pair.recipe["mask_source"] == "anomaly"
    assert pair.recipe["accept"] is None


def test_attempts_have_noise_of_their_own() -> None:
    seeds = [attempt_seed(7, attempt) for attempt in range(20)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert attempt_seed(8, 1) != seeds[1]


def test_the_first_good_attempt_is_taken(dual: Engine) -> None:
    """A bound between the scores of attempts decides which one it is."""
    options = {"placement": own(), **QUICK}
    score = "branch_difference"
    attempts = [
        dual.generate(seeds=[attempt_seed(5, n)], **options)[0].scores[score] for n in range(4)
    ]
    best = int(np.argmin(attempts[1:])) + 1
    limit = (attempts[best] + min(attempts[:best])) / 2
    if attempts[best] < attempts[0]:
        bounds = {f"max_{score}": limit}
    else:
        best = next(n for n in range(1, 4) if attempts[n] > attempts[0])
        bounds = {f"min_{score}": (attempts[best] + max(attempts[:best])) / 2}
    (pair,) = dual.generate(seeds=[5], accept=bounds, attempts=4, **options)
    assert pair.accepted
    assert pair.missed == ()
    assert pair.seed == 5
    assert pair.recipe["attempt"] == best
    assert pair.recipe["accept"] == {**bounds, "attempts": 4}
    (same,) = dual.generate(seeds=[attempt_seed(5, best)], **options)
    assert np.array_equal(pixels(pair), pixels(same))


def test_pairs_keep_their_order_and_do_not_depend_on_their_batch(dual: Engine) -> None:
    """Some are accepted at once, others later: each is the pair that it is alone."""
    options = {"placement": [own(n) for n in range(4)], **QUICK}
    first = [p.scores["branch_difference"] for p in dual.generate(seeds=range(4), **options)]
    accept = {"max_branch_difference": sorted(first)[1] + 1e-6}
    pairs = dual.generate(seeds=range(4), batch=4, accept=accept, attempts=3, **options)
    assert [pair.seed for pair in pairs] == [0, 1, 2, 3]
    assert sum(pair.recipe["attempt"] == 0 for pair in pairs) >= 2
    for n, pair in enumerate(pairs):
        (alone,) = dual.generate(seeds=[n], placement=own(n), accept=accept, attempts=3, **QUICK)
        assert alone.recipe["attempt"] == pair.recipe["attempt"]
        assert np.abs(pixels(pair) - pixels(alone)).max() <= 1


def test_what_misses_a_bound_in_every_attempt_says_so(dual: Engine) -> None:
    calls: list[int] = []
    (pair,) = dual.generate(
        seeds=[5], accept={"max_area": 0.0, "min_area": 1.0}, attempts=3,
        callback_on_step_end=lambda *a: calls.append(a[1]), placement=own(), **QUICK,
    )  # fmt: skip
    assert pair.accepted is False
    assert pair.missed
    assert calls.count(0) == 3


def test_an_interrupted_second_attempt_keeps_good_pairs(dual: Engine) -> None:
    options = {"placement": [own(0), own(1)], **QUICK}
    first = [p.scores["branch_difference"] for p in dual.generate(seeds=[0, 1], **options)]
    accept = {"max_branch_difference": sum(first) / 2}
    calls: list[int] = []

    def stop(engine: Engine, step: int, *_: Any) -> None:
        calls.append(step)
        if calls.count(0) == 2:
            engine.interrupt()

    pairs = dual.generate(seeds=[0, 1], accept=accept, callback_on_step_end=stop, **options)
    assert [pair.seed for pair in pairs] == [int(np.argmin(first))]


def test_rows_hold_scores_and_runs_are_told_apart(dual: Engine, tmp_path: Path) -> None:
    options = {"placement": own(), "accept": "default", "attempts": 1, **QUICK}
    with FolderWriter(tmp_path) as writer:
        for pair in dual.stream(seeds=[1], resume=writer, **options):
            writer.write(pair)
        assert not list(dual.stream(seeds=[1], resume=writer, **options))
        with pytest.raises(OSError, match="other accept"):
            dual.stream(seeds=[1], resume=writer, **{**options, "attempts": 2})
    (row,) = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert row["scores"].keys() == set(SCORES)
    assert row["accepted"] in (True, False)
    assert row["recipe"]["accept"] == {**DEFAULT_ACCEPT, "attempts": 1}


def test_an_empty_mask_keeps_no_lower_bound() -> None:
    bounds = Acceptance.of("default", None, placed=True)
    assert bounds is not None
    empty = {**dict.fromkeys(SCORES), "area": 0.0}
    assert set(bounds.missed(empty)) == set(DEFAULT_ACCEPT)
    assert bounds.missed({**empty, "area": 0.1}) == ()
    without = Acceptance.of("default", None, placed=False)
    assert without is not None
    assert set(without.bounds) == {"min_area"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "image"}, "mask must be one of anomaly, change, both, got 'image'"),
        ({"mask": "change"}, "mask 'change' needs a placement"),
        ({"accept": "good"}, "accept must be 'default' or a dict of bounds, got 'good'"),
        ({"accept": {}}, "accept must be 'default' or a dict"),
        ({"accept": {"min_size": 1}}, "accept has no bound 'min_size': use min_ or max_ and one"),
        ({"accept": {"area": 1}}, "accept has no bound 'area'"),
        ({"accept": {"min_change_inside": 0.1}}, "accept 'min_change_inside' needs a placement"),
        ({"accept": {"min_area": float("nan")}}, "accept 'min_area' must be a finite number"),
        ({"accept": "default", "attempts": 0}, "attempts must be from 1 to 64, got 0"),
        ({"attempts": 3}, "attempts needs accept"),
    ],
)
def test_wrong_requests(dual: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dual.stream(seeds=[1], **options, **QUICK)
