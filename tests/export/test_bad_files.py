"""Files that are damaged, foreign or hostile: refused by name, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.torch import load_file

from dualdiff_engine import Engine
from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import read_artefacts
from support import DATA


@pytest.fixture
def folder(exported: Any, copy_of: Any) -> Path:
    return copy_of(exported("dual"))


def edit(path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    onnx.save(model, path)


def move(location: str, **place: object) -> Callable[[onnx.ModelProto], None]:
    """Say that a weight lies elsewhere."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        for entry in tensor.external_data:
            entry.value = str({"location": location, **place}.get(entry.key, entry.value))

    return change


def refused(folder: Path, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        Engine.from_pretrained(DATA / "dual" / "model", backend="onnxruntime", exported=folder)


@pytest.mark.parametrize(
    "location",
    ["../outside", "/etc/passwd", "adapters/../../outside", "..\\outside", "link", ""],
)
def test_paths_out_of_the_folder(folder: Path, location: str) -> None:
    (folder.parent / "outside").write_bytes(bytes(1 << 20))
    (folder / "link").symlink_to(folder.parent / "outside")
    edit(folder / "denoiser.onnx", move(location))
    refused(folder, "outside its folder for the weights of .*: do not use this file")


def test_a_path_hidden_in_an_attribute(folder: Path) -> None:
    def hide(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[4])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../outside")
        node = onnx.helper.make_node("Constant", [], ["hidden"], value=tensor)
        branch = onnx.helper.make_graph([node], "inner", [], [])
        model.graph.node.append(
            onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
        )

    edit(folder / "denoiser.onnx", hide)
    refused(folder, "refers to '../outside' outside its folder for the weights of hidden")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"offset": 1 << 40}, "is too short for the weights"),
        ({"offset": -8}, "is too short for the weights"),
        ({"length": 4}, "or their size differs"),
        ({"offset": "x"}, "invalid external-data offset for"),
    ],
)
def test_places_beyond_a_file(folder: Path, place: dict[str, object], said: str) -> None:
    edit(folder / "denoiser.onnx", move("network.safetensors", **place))
    refused(folder, said)


@pytest.mark.parametrize("name", ["network.safetensors", "adapters/adapter.safetensors"])
@pytest.mark.parametrize("end", [0, 7, 4096, -1])
def test_truncated_weights(folder: Path, name: str, end: int) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:end])
    refused(folder, "is too short for the weights|damaged or cut off")


def test_weights_that_are_not_there(folder: Path) -> None:
    (folder / "network.safetensors").unlink()
    refused(folder, r"denoiser.onnx needs network.safetensors.*copy both")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\xff" * 1000, b"\x08\x0a"])
def test_no_graph(folder: Path, content: bytes) -> None:
    (folder / "denoiser.onnx").write_bytes(content)
    refused(folder, "not a valid ONNX file|holds no ONNX graph")


def test_another_opset(folder: Path) -> None:
    def convert(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 17

    edit(folder / "denoiser.onnx", convert)
    refused(folder, r"opset 17, its metadata say 23 \(supported: 18 to 23\)")


def test_another_release(folder: Path) -> None:
    def newer(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == "dualdiff.format":
                entry.value = "2"

    edit(folder / "denoiser.onnx", newer)
    refused(folder, "format 2, this release reads 1")


@pytest.mark.parametrize("value", ["{", None])
def test_foreign_metadata(folder: Path, value: str | None) -> None:
    def garble(model: onnx.ModelProto) -> None:
        entry = next(e for e in model.metadata_props if e.key == "dualdiff.base")
        if value is None:
            model.metadata_props.remove(entry)
        else:
            entry.value = value

    edit(folder / "denoiser.onnx", garble)
    refused(folder, "has no valid metadata of")


def test_renamed(folder: Path) -> None:
    (folder / "denoiser.onnx").rename(folder / "other.onnx")
    refused(folder, "other.onnx holds the graph 'denoiser': it was renamed")
    (folder / "other.onnx").unlink()
    refused(folder, "holds no denoiser")
    refused(folder / "nothing", "no folder")


def rewrite(path: Path, **changes: Any) -> None:
    told = weight_files.read_metadata(path)
    weight_files.write(path, load_file(path), {**told, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": {"source": "x", "sha256": "0" * 64}}, "folded for another base model"),
        ({"precision": "float16"}, r"folded for another precision \(float16\)"),
        ({"summary": None}, "not a valid folded adapter"),
    ],
)
def test_wrong_adapter_for_the_base(folder: Path, changes: dict[str, Any], said: str) -> None:
    rewrite(folder / "adapters" / "adapter.safetensors", **changes)
    refused(folder, said)


def test_an_adapter_that_lacks_tensors(folder: Path) -> None:
    path = folder / "adapters" / "other.safetensors"
    told = weight_files.read_metadata(folder / "adapters" / "adapter.safetensors")
    tensors = load_file(folder / "adapters" / "adapter.safetensors")
    gone = sorted(name for name in tensors if name.endswith("gate_weight"))[0]
    del tensors[gone]
    weight_files.write(path, tensors, told)
    refused(folder, f"has no (tensor )?{gone}")


def test_graphs_of_different_bases(folder: Path, exported: Any) -> None:
    for name in ("background_encoder.onnx", "network.safetensors"):
        target = folder / name
        target.write_bytes((exported("bcm") / name).read_bytes())
    (folder / "adapters" / "x.safetensors").write_bytes(
        (exported("bcm") / "adapters" / "adapter.safetensors").read_bytes()
    )
    edit(folder / "background_encoder.onnx", rename_adapter)
    with pytest.raises(BackendError, match=r"different base models|size differs|is too short"):
        read_artefacts(folder)


def rename_adapter(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = entry.value.replace("adapters/adapter", "adapters/x")


@pytest.mark.parametrize("package", ["onnxruntime"])
def test_missing_packages(folder: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(folder, r"not installed: pip install 'dualdiff-engine\[onnx\]'")
