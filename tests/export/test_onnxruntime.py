"""`backend="onnxruntime"`: the golden cases through exported denoisers, and two adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualdiff_engine import Engine
from dualdiff_engine.errors import AdapterError, BackendError, SettingsError
from dualdiff_engine.export.graph.write import ExportOptions, export_onnx
from small import LEAST, PICTURES, other_adapter, small_adapter, small_engine
from support import DATA, Golden, by_branch, noised_background, relative, run_pipeline

# what the deployment promises, against the released program
NOISE = 5e-6


def runtime_engine(golden: Golden, exported: Any, **options: Any) -> Engine:
    return Engine.from_pretrained(
        golden.folder / "model",
        backend="onnxruntime",
        exported=exported(golden.name),
        allow_pickle=True,
        **options,
    )


@pytest.mark.parametrize("folded", ["by the engine", "in the export"])
def test_golden(golden: Golden, exported: Any, folded: str, record_property: Any) -> None:
    adapter = golden.folder / "adapter" if folded == "by the engine" else None
    engine = runtime_engine(golden, exported, adapter=adapter)
    d = golden.denoiser
    noise = engine.predict_noise(
        by_branch(d["sample"]).unsqueeze(2),
        float(d["timestep"]),
        by_branch(d["encoder_hidden_states"]),
        noised_background(engine, golden),
    ).squeeze(2)
    error = relative(noise, by_branch(d["noise_pred"]))
    record_property("noise_error", error)
    assert error <= NOISE
    steps, pictures = run_pipeline(engine, golden)
    for step, value in zip(steps[1:], golden.pipeline["per_step_latents"], strict=True):
        assert relative(step, value) <= NOISE
    assert float((pictures - golden.pipeline["image"]).abs().max()) <= PICTURES


def test_same_pairs_as_the_engine(golden: Golden, exported: Any, engine_of: Any) -> None:
    options: dict[str, Any] = {"steps": 3, "output_type": "pt"}
    if golden.background:
        options["background_latents"] = golden.pipeline["background_latent"]
    eager = engine_of(golden.name).generate([5, 6, 7], batch=2, **options)
    pairs = runtime_engine(golden, exported).generate([5, 6, 7], batch=3, **options)
    for ours, theirs in zip(pairs, eager, strict=True):
        assert float((ours.image - theirs.image).abs().max()) <= PICTURES
        assert float((ours.anomaly - theirs.anomaly).abs().max()) <= PICTURES
        assert ours.seed == theirs.seed
    backends = pairs[0].recipe["backends"]
    assert backends["attention"] == "onnxruntime"
    assert backends["guided_step"] == "reference"


def test_unguided(exported: Any, dual: Engine) -> None:
    """One guidance row, from the same graph."""
    golden = Golden("dual", {}, {}, {})
    ours = runtime_engine(golden, exported).generate([3], steps=2, guidance=1.0, output_type="pt")
    eager = dual.generate([3], steps=2, guidance=1.0, output_type="pt")
    assert float((ours[0].image - eager[0].image).abs().max()) <= PICTURES


def test_two_adapters_by_weights_alone(exported: Any, tmp_path: Path) -> None:
    """Exported once; the second adapter is other values of the same tensors. A, B, A again."""
    other = other_adapter(tmp_path / "other.safetensors")
    model = DATA / "dual" / "model"
    eager = Engine.from_pretrained(model, adapter=other)
    engine = Engine.from_pretrained(model, backend="onnxruntime", exported=exported("dual"))
    first = engine.active_adapter
    assert first is not None
    inputs = torch.randn(2, 1, 2, 4, 16, 16), 321.0, torch.randn(2, 2, 77, 32)
    before = engine.predict_noise(*inputs)
    engine.load_adapter(other)
    changed = engine.predict_noise(*inputs)
    assert relative(changed, eager.predict_noise(*inputs)) <= NOISE
    assert relative(changed, before) > 1e-3
    engine.set_adapter(first)
    assert torch.equal(engine.predict_noise(*inputs), before)


@pytest.mark.parametrize(
    "traced",
    [{}, {"precision": "float16"}, {"exchange_operator": True}],
    ids=["float32", "float16", "operator"],
)
def test_a_switch_is_a_fresh_export(
    exported_small: Any, tmp_path: Path, traced: dict[str, Any]
) -> None:
    """The second adapter by its weights, and graphs that were traced with it: bit for bit.

    Where a runtime computes with weights before it runs, widening them from float16 or turning
    those in a function's body, it must do so with the second adapter's.
    """
    base, file = tmp_path / "base", tmp_path / "other.safetensors"
    engine = small_engine(base, LEAST)
    save_file(small_adapter(engine, 2), file)
    engine.load_adapter(file)
    # both adapters are validated
    export_onnx(engine, tmp_path / "fresh", ExportOptions(batches=(1,), **traced))
    options: dict[str, Any] = {"backend": "onnxruntime", "device": "cpu"}
    fresh = Engine.from_pretrained(base, exported=tmp_path / "fresh", **options)
    assert fresh.active_adapter == "other"
    switched = Engine.from_pretrained(base, exported=exported_small(LEAST, **traced), **options)
    inputs = torch.randn(2, 1, 2, 4, 16, 16), 321.0, torch.randn(2, 2, 77, 32)
    before = switched.predict_noise(*inputs)
    switched.load_adapter(file)
    after = switched.predict_noise(*inputs)
    assert torch.equal(after, fresh.predict_noise(*inputs))
    assert relative(after, before) > 0.1


def test_limits_are_told_before_anything_runs(exported: Any) -> None:
    golden = Golden("dual", {}, {}, {})
    with pytest.raises(BackendError, match=r"max_batch 65 is above the 64 .* --max-batch 65"):
        runtime_engine(golden, exported, max_batch=65)
    engine = runtime_engine(golden, exported, max_batch=2)
    with pytest.raises(SettingsError, match="batch must be from 1 to 2"):
        engine.generate(4, batch=3)
    with pytest.raises(BackendError, match="a batch of 65 is above the 64"):
        engine.predict_noise(torch.zeros(2, 1, 65, 4, 16, 16), 1, torch.zeros(2, 2, 77, 32))
    with pytest.raises(BackendError, match=r"exported for latents of 16 x 16.*--dynamic-size"):
        engine.generate(1, size=64, steps=1)
    with pytest.raises(BackendError, match="exported in float32, asked for float16"):
        runtime_engine(golden, exported, dtype="float16")
    with pytest.raises(BackendError, match=r"dualdiff export onnx.*exported=FOLDER"):
        Engine.from_pretrained(DATA / "dual" / "model", backend="onnxruntime")


def test_another_kind_of_adapter_is_refused(exported: Any) -> None:
    with pytest.raises(AdapterError, match="no denoiser for adapters with background"):
        runtime_engine(Golden("dual", {}, {}, {}), exported, adapter=DATA / "bcm" / "adapter")


def test_another_base_is_refused(exported: Any) -> None:
    with pytest.raises(BackendError, match="exported from another base model"):
        Engine.from_pretrained(
            DATA / "bcm" / "model", backend="onnxruntime", exported=exported("dual")
        )


def test_never_another_device(exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA asked, and the runtime lacks it, or has it and cannot start it: an error, both times."""
    from dualdiff_engine.export.run import onnx_session

    device = torch.device("cuda")
    with pytest.raises(BackendError, match=r"cannot run on cuda.*ort-gpu"):
        onnx_session.Session(exported("dual") / "denoiser.onnx", device)
    monkeypatch.setattr(
        onnx_session, "provider_of", lambda device: ("CUDAExecutionProvider", {"device_id": 0})
    )
    with pytest.raises(BackendError, match="could not start its CUDAExecutionProvider"):
        onnx_session.Session(exported("dual") / "denoiser.onnx", device)
