"""Derived tolerances: what eager PyTorch loses at that precision, plus a rounding band."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from support import relative


def assert_within_budget(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, terms: int = 0
) -> None:
    """The error against fp64 may be that of `eager`, in the same dtype, plus one rounding.

    terms: of the longest sum, where the result is so small that eager may be right by luck: then
    the error may also be what adding them in turn in fp32 loses, u sqrt(terms / 6) of the result
    (every partial sum is rounded, with a variance of a third of half a unit squared). Prints the
    share of the budget used.
    """
    assert actual.dtype == eager.dtype
    assert exact.dtype == torch.float64
    # storing the result alone costs up to half a unit in the last place
    in_turn = torch.finfo(torch.float32).eps / 2 * math.sqrt(terms / 6)
    budget = max(relative(eager, exact), in_turn) + torch.finfo(actual.dtype).eps / 2
    used = relative(actual, exact) / budget
    print(f"{name}: {used:.0%} of a budget of {budget:.1e}")
    assert used <= 1, f"{name}: error {used:.2f} times the budget {budget:.2e}"
