"""Ranking metrics against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.evaluation.metrics import auroc, average_precision, f1_max

# few levels, so that most scores tie
rows = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(
    lambda found: len({label for _, label in found}) == 2
)


def by_definition(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """AUROC as a count over all pairs; AP and F1 over every threshold."""
    ahead = scores[labels][:, None] - scores[~labels][None]
    area = ((ahead > 0) + 0.5 * (ahead == 0)).mean()
    precision_sum = before = best = 0.0
    for threshold in np.unique(scores)[::-1]:
        chosen = scores >= threshold
        hits = (chosen & labels).sum()
        precision_sum += (hits - before) / labels.sum() * hits / chosen.sum()
        best = max(best, 2 * hits / (chosen.sum() + labels.sum()))
        before = hits
    return float(area), float(precision_sum), float(best)


@settings(max_examples=150, deadline=None)
@given(rows)
def test_metrics_are_their_definitions(found: list[tuple[int, bool]]) -> None:
    scores, labels = (np.array(column) for column in zip(*found, strict=True))
    tensors = torch.from_numpy(scores).float(), torch.from_numpy(labels)
    measured = [metric(*tensors) for metric in (auroc, average_precision, f1_max)]
    # 40 additions in float64
    assert measured == pytest.approx(by_definition(scores, labels), abs=1e-13)


def test_known_cases() -> None:
    labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    perfect = torch.tensor([[9.0, 1, 2, 8], [0, -3, 1, 2]])
    assert [m(perfect, labels) for m in (auroc, average_precision, f1_max)] == [1, 1, 1]
    assert auroc(-perfect, labels) == 0
    constant = torch.full((2, 4), -0.5)
    # every threshold marks everything: precision is the share of positives, 2 of 8
    assert auroc(constant, labels) == 0.5
    assert average_precision(constant, labels) == 0.25
    assert f1_max(constant, labels) == pytest.approx(2 * 2 / (8 + 2))
    infinite = torch.tensor([torch.inf, -torch.inf, 0.0])
    assert auroc(infinite, torch.tensor([1, 0, 0])) == 1


def test_agree_with_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    labels = rng.random(5000) < 0.1
    scores = np.round(rng.normal(0, 1, 5000) + labels, 1)
    tensors = torch.from_numpy(scores), torch.from_numpy(labels)
    assert auroc(*tensors) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = metrics.average_precision_score(labels, scores)
    assert average_precision(*tensors) == pytest.approx(expected, abs=1e-12)
    precision, recall, _ = metrics.precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert f1_max(*tensors) == pytest.approx(f1.max(), abs=1e-9)


@pytest.mark.parametrize("metric", [auroc, average_precision, f1_max])
def test_impossible_inputs_are_told(metric: object) -> None:
    with pytest.raises(SettingsError, match="must have the same shape"):
        metric(torch.zeros(3), torch.zeros(4))  # type: ignore[operator]
    with pytest.raises(SettingsError, match="no label is positive"):
        metric(torch.zeros(3), torch.zeros(3))  # type: ignore[operator]
    with pytest.raises(SettingsError, match="NaN"):
        metric(torch.tensor([0.0, torch.nan]), torch.ones(2))  # type: ignore[operator]


def test_auroc_needs_a_negative() -> None:
    with pytest.raises(SettingsError, match="every label is positive"):
        auroc(torch.zeros(3), torch.ones(3))
