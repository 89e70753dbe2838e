"""The exchange's kernel as a TensorRT plugin launches it: what it is passed, in which order."""

from __future__ import annotations

import math

import pytest
import torch

from dualdiff_engine.exchanges.interaction import fold_interaction
from dualdiff_engine.exchanges.kind import Affine
from dualdiff_engine.export.trt import exchange_plugin
from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton import exchange as op
from op_inputs import exchange_arguments, unfolded_interaction
from tolerance import assert_within_budget


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("positions", "channels"), [(63, 48), (1, 80), (70, 96)])
def test_inputs_then_positions_then_output(
    dtype: torch.dtype, positions: int, channels: int
) -> None:
    """In half precision, the gate's bias in fp32 as exports hold it; the last block is not full."""
    given, parts = exchange_arguments(positions, channels, dtype)
    given[2] = fold_interaction(parts, torch.empty(0, dtype=torch.float64))["gate_bias"].float()
    x, residual = given[0], given[-1]
    out = torch.full_like(x, math.nan)
    what = op.compilation(
        channels, dtype, exchange_plugin.CONFIG, eps=INTERACTION_EPS, gate_bias=torch.float32
    )
    blocks = -(-positions // exchange_plugin.CONFIG.blocks["BLOCK_M"])
    what.kernel[(blocks,)](*given, positions, out, **what.constants)
    wide = {n: Affine(a.weight.double(), a.bias.double()) for n, a in parts.items()}
    exact = unfolded_interaction(x.double(), wide) + residual.double()
    eager = unfolded_interaction(x, parts) + residual
    assert_within_budget("as a plugin", out, eager, exact)
