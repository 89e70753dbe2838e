"""Exported graphs: what they hold, and that they compute what the engine does."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dualdiff_engine import adapters
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import read_artefacts
from dualdiff_engine.export.folder.bundle import add_adapter
from dualdiff_engine.export.graph import validate
from dualdiff_engine.export.graph.write import ExportOptions, export_onnx
from small import LEAST
from support import DATA, Golden, golden_engine
from training_cases import base_of, coupled_adapter

GRAPHS = {
    "dual": {"denoiser", "text_encoder", "vae_decoder", "vae_encoder"},
    "bcm": {
        "denoiser_background",
        "background_encoder",
        "text_encoder",
        "vae_decoder",
        "vae_encoder",
    },
}


@pytest.fixture
def folder(golden: Golden, exported: Any) -> Path:
    return exported(golden.name)


def graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def test_report_and_checker(golden: Golden, folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["graphs"].keys() == GRAPHS[golden.name]
    assert {path.stem for path in folder.glob("*.onnx")} == GRAPHS[golden.name]
    for name, about in report["graphs"].items():
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)
        (row,) = about["adapters"].values()
        assert len(row["cases"]) >= 2
        assert all(case["error"] <= row["tolerance"] for case in row["cases"])
        assert row["tolerance"] == (2e-5 if name.startswith("vae") else 5e-6)
    network = report["graphs"]["denoiser_background" if golden.background else "denoiser"]
    (row,) = network["adapters"].values()
    assert {(case["batch"], case["rows"]) for case in row["cases"]} == {
        (1, 2), (2, 2), (3, 2), (1, 1),
    }  # fmt: skip
    # every attention is one operator: 10 self sites and 10 text sites
    assert network["attentions"] == 20


def test_standard_operators_only(folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        model = graph(path)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
        assert not model.functions
        assert [entry.version for entry in model.opset_import if not entry.domain] == [23]


def test_nothing_of_this_machine_is_in_the_files(folder: Path) -> None:
    for path in folder.glob("*.onnx"):
        strings = re.findall(rb"[ -~]{6,}", path.read_bytes())
        assert not [s for s in strings if b"site-packages" in s or b"/home/" in s or b".py" in s]


def test_metadata_says_what_it_is(golden: Golden, folder: Path, engine_of: Any) -> None:
    engine: Engine = engine_of(golden.name)
    for name, artefact in read_artefacts(folder).items():
        assert artefact.graph == name
        assert artefact.base.sha256 == engine.base.sha256
        assert artefact.adapter.sha256 == engine.active.summary.sha256
        assert artefact.scheduler["_class_name"] == "PNDMScheduler"
        assert (artefact.height, artefact.width, artefact.opset) == (16, 16, 23)
        assert artefact.versions.keys() >= {"dualdiff-engine", "torch", "onnx"}


def test_weights_keep_their_names(golden: Golden, folder: Path, engine_of: Any) -> None:
    """An adapter file holds the engine's folded tensors under the network's own names."""
    engine: Engine = engine_of(golden.name)
    (path,) = [p for p in (folder / "adapters").iterdir() if ".probe." not in p.name]
    tensors = load_file(path)
    turned = set(weight_files.read_metadata(path)["transposed"])
    assert set(engine.active.sites) < set(tensors)
    for name, tensor in engine.active.sites.items():
        found = tensors[name].transpose(-1, -2) if name in turned else tensors[name]
        torch.testing.assert_close(found, tensor, rtol=0, atol=0)
    # text encoder: q, k, v, out of both layers
    assert len(set(tensors) - set(engine.active.sites)) == 8


def test_weights_are_shared_and_begin_on_pages(folder: Path) -> None:
    """No weight is stored twice, and none in the graphs themselves."""
    named: dict[str, set[tuple[str, str]]] = {}
    for path in folder.glob("*.onnx"):
        assert path.stat().st_size < 500_000
        for tensor in graph(path).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {entry.key: entry.value for entry in tensor.external_data}
                key = f"{path.stem.split('_')[0] in ('text', 'vae')} {tensor.name}"
                named.setdefault(key, set()).add((place["location"], place["offset"]))
    assert all(len(places) == 1 for places in named.values())
    for path in folder.rglob("*.safetensors"):
        assert min(place.offset for place in weight_files.places(path).values()) % 4096 == 0


@pytest.mark.parametrize("graph", ["vae_decoder", "vae_encoder"])
def test_pictures_may_lose_what_their_norms_add_up(dual: Engine, folder: Path, graph: str) -> None:
    """Four times the numbers at twice the side; below a hundredth of half a level at this size."""
    artefact = replace(read_artefacts(folder)["vae_decoder"], graph=graph)
    (small,) = validate._normed(dual.vae, artefact)
    (large,) = validate._normed(dual.vae, replace(artefact, height=32, width=32))
    assert large == 4 * small > 0
    assert validate._tolerance(dual, artefact, (1,), 1.0)[0] == validate.PICTURE
    huge = validate._tolerance(dual, replace(artefact, height=512, width=512), (1,), 1.0)[0]
    assert huge == pytest.approx(validate.UNIT * (1024 * small / 9) ** 0.5)
    # the engine's own decoder is on no other device for it
    assert next(dual.vae.parameters()).device.type == "cpu"


def test_an_export_that_misses_its_tolerance_is_not_kept(
    exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the graph computed something else: the engine that it is compared with is changed."""
    folder = exported("dual")
    engine = golden_engine("dual")
    site = next(name for name in engine.active.sites if name.endswith("gate_weight"))
    engine.unet.load({site: engine.active.sites[site] * 1.01})
    with pytest.raises(BackendError, match=r"denoiser: relative error .* not kept"):
        validate.validate(engine, folder, "adapter", (1,), {"denoiser"}, lambda line: None)

    def half_way(exporter: Any) -> None:
        (exporter.folder / "denoiser.onnx").touch()
        raise BackendError("missed")

    monkeypatch.setattr("dualdiff_engine.export.graph.write.Exporter.add_adapter", half_way)
    with pytest.raises(BackendError, match="missed"):
        export_onnx(golden_engine("dual"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_amplifies_rounding(exported: Any, copy_of: Any, tmp_path: Path) -> None:
    """Scaled by 1.5, float32 itself is tens of units off float64, in PyTorch as in the graph."""
    folder, file = copy_of(exported("dual")), tmp_path / "scaled.safetensors"
    adapters.convert(DATA / "dual" / "adapter", file)
    save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file)
    report = add_adapter(DATA / "dual" / "model", file, folder)
    row = report["graphs"]["denoiser"]["adapters"]["scaled"]
    worst = max(case["error"] for case in row["cases"])
    assert validate.FP32 < worst <= row["tolerance"] < 1e-3
    assert row["tolerance_is"] == "what this adapter makes of fp32 rounding, against fp64"
    # the plain adapter's bound is as tight as ever
    assert report["graphs"]["denoiser"]["adapters"]["adapter"]["tolerance"] == validate.FP32
    # and a weight that is a hundredth off is still found
    engine = Engine.from_pretrained(DATA / "dual" / "model", adapter=file, device="cpu")
    site = next(name for name in engine.active.sites if name.endswith("gate_weight"))
    engine.unet.load({site: engine.active.sites[site] * 1.01})
    with pytest.raises(BackendError, match=r"denoiser: relative error .* not kept"):
        validate.validate(engine, folder, "scaled", (1, 2, 3), set(), lambda line: None)


def test_bfloat16_has_no_resize(exported_small: Any) -> None:
    """ONNX Runtime has none in bfloat16: it lies between casts, which change no value."""
    model = graph(exported_small(LEAST, precision="bfloat16") / "denoiser.onnx")
    makers = {name: node for node in model.graph.node for name in node.output}
    readers = [node for node in model.graph.node if makers.get(node.input[0])]
    resizes = [node for node in model.graph.node if node.op_type == "Resize"]
    assert resizes
    for resize in resizes:
        before = makers[resize.input[0]]
        (after,) = (node for node in readers if resize.output[0] in node.input)
        assert (before.op_type, before.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)
        assert (after.op_type, after.attribute[0].i) == ("Cast", onnx.TensorProto.BFLOAT16)


def test_the_written_graphs_run_before_they_are_kept(exported: Any, copy_of: Any) -> None:
    """Another length of prompts, another VAE than was traced: neither passes."""
    folder = copy_of(exported("dual"))
    engine = golden_engine("dual")
    with torch.no_grad():
        next(engine.vae.decoder.conv_out.parameters()).mul_(1.01)
    # graphs that are not fresh are not validated again, but the probe runs through them
    with pytest.raises(
        BackendError, match=r"vae_decoder: with the base model's own prompts .* kept"
    ):
        validate.validate(engine, folder, "adapter", (1,), set(), lambda line: None)
    engine = golden_engine("dual")
    engine.text_encoder.tokenizer.model_max_length = 16
    with pytest.raises(BackendError, match=r"cannot run .*\.onnx .*16"):
        validate.validate(engine, folder, "adapter", (1,), set(), lambda line: None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"opset": 17}, "opset 17"),
        ({"opset": 99}, "opset 99"),
        ({"precision": "int8"}, "int8"),
        ({"max_batch": 0}, "max_batch"),
        ({"batches": (1, 65)}, "batches"),
    ],
)
def test_options_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        ExportOptions(**options)


def test_folders_are_checked(dual: Engine, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for out, said in ((tmp_path / "full", "not empty"), (tmp_path / "no" / "out", "no folder")):
        with pytest.raises(SettingsError, match=said):
            export_onnx(dual, out)
    with pytest.raises(SettingsError, match="multiples of 8"):
        export_onnx(dual, tmp_path / "out", ExportOptions(height=100))
    assert not (tmp_path / "out").exists()


def test_another_coupling_is_refused_before_anything_is_traced(tmp_path: Path) -> None:
    """By name: graphs hold DualAnoDiff's alone."""
    adapter = coupled_adapter(tmp_path / "dh.safetensors")
    refused = pytest.raises(SettingsError, match=r"'dh' cannot be exported: .*connect/none")
    with Engine.from_pretrained(base_of(False), adapter=adapter) as engine, refused:
        export_onnx(engine, tmp_path / "graphs")
    assert not (tmp_path / "graphs").exists()
