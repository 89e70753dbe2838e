"""One denoiser call of each golden case with every op a Triton kernel, interpreted."""

from __future__ import annotations

from dualdiff_engine.ops import NAMES, bind
from support import Golden, by_branch, denoiser_call, golden_engine, relative

# the bound the network has on every backend: fp32 rounding through some sixty layers, and the
# interpreter's dot products are summed in another order than BLAS'
FP32 = 5e-6


def test_auto_takes_no_kernel_that_was_not_measured() -> None:
    table = {row.op: row for row in bind("auto").table}
    assert all(row.backend != "triton" for row in table.values())
    assert "not triton: interpreted kernels are for tests" in table["attention"].reason


def test_noise_and_every_layer(golden: Golden) -> None:
    engine = golden_engine(golden.name, backend="triton")
    assert {row.backend for row in engine.ops.table} == {"triton"}
    assert {row.op for row in engine.ops.table} == set(NAMES)
    noise, layers = denoiser_call(engine, golden)
    assert relative(noise, by_branch(golden.denoiser["noise_pred"])) <= FP32
    for name, value in golden.denoiser.items():
        if name.startswith("layer."):
            layer = name.removeprefix("layer.")
            assert relative(layers[layer], by_branch(value)) <= FP32, layer
