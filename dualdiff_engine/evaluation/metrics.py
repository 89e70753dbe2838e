"""Exact ranking metrics over all thresholds, in torch.

Scores are ranked once; equal scores stand at one threshold, so ties count as the definitions say
whatever the order they come in. Ranks and counts are exact up to 2^53 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dualdiff_engine.errors import SettingsError


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a positive outranks a negative; a tie counts half.

    Args:
        scores: real, any shape, no NaN.
        labels: the same shape, nonzero on positives.

    Returns:
        A number in [0, 1]; 0.5 for constant scores.

    Raises:
        SettingsError: the shapes differ, scores hold NaN, or one class is missing.
    """
    true, false = _counts(scores, labels)
    if not false[-1]:
        raise SettingsError("AUROC needs negative labels, but every label is positive")
    recall, fallout = true / true[-1], false / false[-1]
    zero = torch.zeros(1, dtype=torch.float64)
    return float(torch.trapezoid(torch.cat([zero, recall]), torch.cat([zero, fallout])))


def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Mean of the precision over the steps of recall, without interpolation.

    AP = sum over thresholds n of (R_n - R_{n-1}) P_n. Arguments and errors as of `auroc`, but
    negatives may be missing.
    """
    true, false = _counts(scores, labels)
    gained = torch.diff(true, prepend=torch.zeros(1, dtype=torch.float64)) / true[-1]
    return float((gained * true / (true + false)).sum())


def f1_max(scores: Tensor, labels: Tensor) -> float:
    """Largest F1 = 2 TP / (TP + FP + P) of `score >= threshold`, over all thresholds.

    Arguments and errors as of `average_precision`.
    """
    true, false = _counts(scores, labels)
    return float((2 * true / (true + false + true[-1])).max())


def _counts(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """True and false positives at every distinct threshold, highest first, float64 [T]."""
    if scores.shape != labels.shape:
        raise SettingsError(
            f"scores {list(scores.shape)} and labels {list(labels.shape)} must have the same shape"
        )
    scores, positive = scores.flatten(), labels.flatten() != 0
    if scores.isnan().any():
        raise SettingsError("scores hold NaN: the predictor diverged")
    if not positive.any():
        raise SettingsError("ranking metrics need positive labels, but no label is positive")
    ranked, order = scores.sort(descending=True)
    true = positive[order].double().cumsum(0)
    ends = torch.cat([ranked.diff().nonzero().flatten(), torch.tensor([len(ranked) - 1])])
    true = true[ends]
    return true, ends.double() + 1 - true
