"""Half precisions, another opset, any size, the exchange as one operator."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dualdiff_engine import Engine
from dualdiff_engine.cli import main
from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder import bundle
from small import LEAST, NAME, WIDE, small_adapter, small_engine
from support import relative


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


def network(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    return report["graphs"]["denoiser"]


def test_float16(exported_small: Any, record_property: Any) -> None:
    """No further off than eager PyTorch in float16, and its weights in float16 too."""
    folder = exported_small(WIDE, precision="float16")
    row = network(folder)["adapters"][NAME]
    worst = max(case["error"] for case in row["cases"])
    record_property("float16_error", worst)
    record_property("float16_budget_used", worst / row["tolerance"])
    assert worst <= row["tolerance"] < 4e-3
    assert network(folder)["attentions"] == 8
    kinds = {t.dtype for t in load_file(folder / "network.safetensors").values()}
    assert kinds == {torch.float16}
    adapter = load_file(folder / "adapters" / f"{NAME}.safetensors")
    wide = {name.rpartition(".")[2] for name, t in adapter.items() if t.dtype == torch.float32}
    # of the text encoder, and of the gate, whose scores are fp32
    assert wide == {"gate_bias", "weight"}


def test_float16_runs_in_an_engine(exported_small: Any, base: Path) -> None:
    folder = exported_small(WIDE, precision="float16")
    eager = small_engine(base, WIDE)
    engine = Engine.from_pretrained(base, backend="onnxruntime", exported=folder, device="cpu")
    assert engine.dtype == torch.float16
    inputs = torch.randn(2, 1, 2, 4, 16, 16), 400.0, torch.randn(2, 2, 77, 32)
    error = relative(engine.predict_noise(*inputs), eager.predict_noise(*inputs))
    assert error <= network(folder)["adapters"][NAME]["tolerance"]
    with pytest.raises(BackendError, match="exported in float16, asked for float32"):
        Engine.from_pretrained(base, exported=folder, backend="onnxruntime", dtype="float32")


def test_bfloat16(exported_small: Any) -> None:
    """Weights in bfloat16, and validated as float32 with those values: CPUs have no more."""
    folder = exported_small(LEAST, precision="bfloat16")
    row = network(folder)["adapters"][NAME]
    assert max(case["error"] for case in row["cases"]) <= row["tolerance"] < 3e-2
    kinds = {t.dtype for t in load_file(folder / "network.safetensors").values()}
    assert kinds == {torch.bfloat16}
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != "adapters"]


def test_opset_18_of_any_size(exported_small: Any, base: Path) -> None:
    folder = exported_small(LEAST, opset=18, dynamic_size=True)
    about = network(folder)
    sizes = {(case["height"], case["width"]) for case in about["adapters"][NAME]["cases"]}
    assert sizes == {(16, 16), (19, 11)}
    model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert about["attentions"] == 0
    eager = small_engine(base, LEAST)
    engine = Engine.from_pretrained(base, backend="onnxruntime", exported=folder)
    options: dict[str, Any] = {"steps": 2, "size": (72, 104), "output_type": "pt"}
    (ours,), (theirs,) = engine.generate([1], **options), eager.generate([1], **options)
    assert float((ours.image - theirs.image).abs().max()) <= 2e-4


def test_frequencies_are_numbers_as_pytorch_rounds_them(exported_small: Any) -> None:
    """NumPy, by which constants are folded, rounds six of these sixteen exponentials otherwise."""
    model = onnx.load(exported_small(LEAST) / "denoiser.onnx", load_external_data=False)
    kept = [t for t in model.graph.initializer if not t.external_data and 16 in t.dims]
    (found,) = (onnx.numpy_helper.to_array(t) for t in kept if t.data_type == 1)
    exponent = -math.log(10000) * torch.arange(16, dtype=torch.float32) / 16
    assert torch.equal(torch.from_numpy(found.copy()).flatten(), torch.exp(exponent))


def test_exchange_as_an_operator_with_a_body(exported_small: Any) -> None:
    """Bit for bit the graph without it: every runtime that does not know it takes the body."""
    plain = network(exported_small(LEAST))
    folder = exported_small(LEAST, exchange_operator=True)
    own = network(folder)
    model = onnx.load(folder / "denoiser.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node if node.domain == "com.dualdiff"]
    assert kinds == ["Exchange"] * 2
    (body,) = model.functions
    assert {node.domain for node in body.node} == {""}
    assert own["nodes"] < plain["nodes"]
    for ours, theirs in zip(
        own["adapters"][NAME]["cases"], plain["adapters"][NAME]["cases"], strict=True
    ):
        assert ours["error"] == pytest.approx(theirs["error"], rel=1e-6)


@pytest.mark.parametrize("operator", [False, True])
def test_adapters_that_join_keep_the_operator(
    exported_small: Any, copy_of: Any, base: Path, monkeypatch: pytest.MonkeyPatch, operator: bool
) -> None:
    """Graphs that are traced for them are as those that are there."""
    engine, asked = small_engine(base, LEAST), []

    def noted(folder: Path, exporter: Any) -> dict[str, Any]:
        asked.append(exporter.options.exchange_operator)
        return {}

    monkeypatch.setattr(bundle, "_or_nothing", noted)
    save_file(small_adapter(engine, 2), base.with_name("other.safetensors"))
    folder = copy_of(exported_small(LEAST, exchange_operator=operator))
    bundle.add_adapter(base, base.with_name("other.safetensors"), folder)
    assert asked == [operator]


def test_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of `export onnx` on the least network; what it refuses, in one line."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    small_engine(base, LEAST)
    options = ["--base", str(base), "--adapter", str(adapter), "--out", str(tmp_path / "out")]
    for wrong, said in (
        (["--opset", "9"], "opset 9 is not supported"),
        (["--size", "big"], "--size must be 512"),
        (["--batches", "1;2"], "batch sizes must be numbers"),
        ([], "adapter"),
    ):
        assert main(["export", "onnx", *options, *wrong]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", "onnx", *options]) == 2
    assert "pip install 'dualdiff-engine[onnx]'" in capsys.readouterr().err
