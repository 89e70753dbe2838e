"""guided_step in the interpreter against fp64."""

from __future__ import annotations

import pytest
import torch

from dualdiff_engine.ops import reference
from dualdiff_engine.ops.triton.guided_step import guided_step
from tolerance import assert_within_budget


@pytest.mark.parametrize("shape", [(2, 2, 3, 4, 5, 7), (1, 2, 1, 4, 16, 17)])
def test_guided_step(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    uncond, cond = noise.double().unbind(1)
    exact = uncond + 2.5 * (cond - uncond)
    eager = reference.guided_step(noise, 2.5)
    assert_within_budget("guided_step", guided_step(noise, 2.5), eager, exact)


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"takes noise \[F, 2, ...\]; got \[2, 3, 4\]"):
        guided_step(torch.zeros(2, 3, 4), 2.5)


def test_registration() -> None:
    torch.library.opcheck(guided_step, (torch.randn(2, 2, 3, 4), 2.5))
