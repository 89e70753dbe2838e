"""Measuring with kernels among the candidates, as on a GPU: timed, kept, bound where it won."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualdiff_engine.model import binding, tuning
from dualdiff_engine.ops import backend_op, bind, measure, record
from support import by_branch, denoiser_call, golden_engine, load_golden, relative

CPU, F32 = torch.device("cpu"), torch.float32


def test_a_kernel_is_measured_and_taken_where_it_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DUALDIFF_CACHE", str(tmp_path))
    golden = load_golden("dual")
    with golden_engine("dual") as engine:
        tokens = engine.text_encoder.tokenizer.model_max_length
        network = tuning.Network(engine.base.unet_config, engine.base.sample_size, tokens)
    calls = [c for x in network.calls(1)["plain"].values() for c in x if c.op == "geglu"]
    times = measure.time_call(calls[0], CPU, F32)
    assert {"triton", "reference"} <= set(times)
    assert next(iter(times)) == bind().recorded["geglu"]
    # interpreted kernels win nothing: by decree, then
    choices = {calls[0].name: "triton"}
    record.write(record.Key.of(CPU, F32, network), 1, record.Record(choices, network.places(), {}))
    with golden_engine("dual") as engine:
        assert engine.ops.recorded == bind().recorded | choices
        kernels = {
            place
            for place, (module, attribute) in binding.places(engine.unet).items()
            if getattr(module, attribute).geglu is backend_op("triton", "geglu")
        }
        made = network.places()["plain"]
        assert kernels == {place for place, names in made.items() if calls[0].name in names}
        noise, _ = denoiser_call(engine, golden)
    assert relative(noise, by_branch(golden.denoiser["noise_pred"])) <= 5e-6
