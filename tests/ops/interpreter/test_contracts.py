"""The kernels refuse what every backend refuses, in the same words."""

from __future__ import annotations

import pytest

from dualdiff_engine.ops import NAMES, backend_op
from op_inputs import refuses


@pytest.mark.parametrize("op", NAMES)
def test_a_kernel_keeps_to_the_contract(op: str) -> None:
    refuses(backend_op("triton", op), op)
