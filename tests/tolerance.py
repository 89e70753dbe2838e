"""Derived tolerances: what eager PyTorch loses at that precision, plus a rounding band."""

from __future__ import annotations

import torch
from torch import Tensor

from support import relative


def assert_within_budget(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The error against fp64 may be that of `eager`, in the same dtype, plus one rounding.

    Prints the share of the budget used.
    """
    assert actual.dtype == eager.dtype
    assert exact.dtype == torch.float64
    # storing the result alone costs up to half a unit in the last place
    budget = relative(eager, exact) + torch.finfo(actual.dtype).eps / 2
    used = relative(actual, exact) / budget
    print(f"{name}: {used:.0%} of a budget of {budget:.1e}")
    assert used <= 1, f"{name}: error {used:.2f} times the budget {budget:.2e}"
