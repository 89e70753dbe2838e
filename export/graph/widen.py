"""bfloat16 graphs where nothing computes in bfloat16: the same graph and weights, in float32.

ONNX Runtime has no bfloat16 products on a CPU. The weights keep the values they were rounded to;
what is not seen is the rounding of what flows between operators.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, numpy_helper
from safetensors import safe_open
from torch import Tensor

from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import Artefact
from dualdiff_engine.export.run.onnx_session import Session

CPU = torch.device("cpu")
_WIDE, _HALF = TensorProto.FLOAT, TensorProto.BFLOAT16


def cpu_session(path: Path, artefact: Artefact, changed: Mapping[str, Tensor]) -> Session:
    """A graph on the CPU, which for products in bfloat16 means: widened."""
    if artefact.precision != "bfloat16" or not artefact.of_network:
        return Session(path, CPU, changed)
    with tempfile.TemporaryDirectory(dir=path.parent) as wide:
        wider = {name: tensor.float() for name, tensor in changed.items()}
        return Session(widened(path, Path(wide)), CPU, wider)


def widened(graph: Path, folder: Path) -> Path:
    """Write a bfloat16 graph as float32 into `folder`; returns the new file."""
    model = weight_files.load_graph(graph)
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _WIDE
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == _HALF:
                attribute.i = _WIDE
            if attribute.t.data_type == _HALF:
                _widen_here(attribute.t)
    _widen_initializers(model, graph, folder)
    path = folder / graph.name
    onnx.save(model, path)
    return path


def _widen_here(tensor: TensorProto) -> None:
    array = numpy_helper.to_array(tensor).astype("float32")
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _widen_initializers(model: onnx.ModelProto, graph: Path, folder: Path) -> None:
    wide, external = {}, {}
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.data_type == _HALF:
                _widen_here(tensor)
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        with safe_open(graph.parent / entries["location"], "pt") as file:
            value = file.get_tensor(tensor.name)
        # the background pass reads the first branch of a tensor of both
        wide[tensor.name] = value.flatten()[: torch.Size(tensor.dims).numel()].view(*tensor.dims)
        external[tensor.name] = tensor
    weights = folder / f"{graph.stem}.safetensors"
    weight_files.write(weights, {name: value.float() for name, value in wide.items()}, {})
    for name, place in weight_files.places(weights).items():
        tensor = external[name]
        tensor.data_type = _WIDE
        metadata = {"location": place.file, "offset": place.offset, "length": place.length}
        del tensor.external_data[:]
        for key, value in metadata.items():
            tensor.external_data.add(key=key, value=str(value))
