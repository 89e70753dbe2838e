"""Weights next to a graph: safetensors files that ONNX reads as its external data.

An ONNX initializer may live at (file, offset, length), raw and little-endian; a safetensors file
is that behind a header that names every tensor. So one file serves both: any ONNX runtime reads
it, and any safetensors reader lists, checks or replaces its tensors by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualdiff_engine.errors import BackendError

# where a page of memory may begin, so that files can be mapped
_PAGE = 4096
# the one key of our metadata: with several, safetensors writes them in any order
_KEY = "dualdiff"
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.DOUBLE: 8,
    TensorProto.INT64: 8,
    TensorProto.INT32: 4,
    TensorProto.INT8: 1,
    TensorProto.UINT8: 1,
    TensorProto.BOOL: 1,
}
# as ONNX Runtime has it: files may be links into one other folder, not into many
_OWN_LINKS = "; if its links are your own, copy the folder with `cp -rL` and use the copy"
_USE_INTACT = "use an intact copy or export it again"


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in its file."""

    file: str
    offset: int
    length: int
    shape: tuple[int, ...]


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors whose bytes begin on a page.

    Files of the same names, shapes and dtypes keep their bytes at the same offsets, whatever their
    metadata says (up to a page of it): one can take the other's place.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])))
    described = json.dumps(metadata, sort_keys=True)
    described += " " * (-len(described) % _PAGE)
    # what safetensors will write; if it writes otherwise, the bytes begin elsewhere, no harm done
    header: dict[str, Any] = {"__metadata__": {_KEY: described}}
    begin = 0
    for name, tensor in ordered.items():
        end = begin + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    described += " " * (-(8 + length) % _PAGE)
    contiguous = {name: tensor.contiguous() for name, tensor in ordered.items()}
    save_file(contiguous, path, metadata={_KEY: described})
    # safetensors gives files to their owner alone
    path.chmod(0o644)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write` stored. Raises BackendError."""
    return _open(path)[0]


def places(path: Path) -> dict[str, Place]:
    """Every tensor of a file. Raises BackendError if it is damaged."""
    return _open(path)[1]


def _open(path: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    _require_file(path)
    try:
        # the library checks the header and that the file is as long as it says
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise BackendError(f"{path} is damaged or cut off ({error}): {_USE_INTACT}") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = Place(path.name, 8 + length + begin, end - begin, shape)
    return metadata, found


def _require_file(path: Path) -> None:
    """Not a pipe, which would wait for ever. Raises BackendError."""
    if not path.is_file():
        raise BackendError(f"{path} is missing or not a regular file: {_USE_INTACT}")


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights, and check where its weights are stored.

    Raises BackendError when it is not a valid ONNX file, or when it refers to a path outside its
    folder, to a missing file, or beyond a file's end.
    """
    _require_file(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read ({error.strerror or error}): check the path"
        ) from error
    except Exception as error:
        # protobuf's DecodeError has no more specific base class
        raise BackendError(f"{path} is not a valid ONNX file ({error}): {_USE_INTACT}") from error
    if not model.graph.node:
        raise BackendError(f"{path} holds no ONNX graph: {_USE_INTACT}")
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            _check_place(path, tensor)
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, those in attributes and in nested graphs too."""
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        while graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes.extend(graph.node)
        while nodes:
            for attribute in nodes.pop().attribute:
                yield from (attribute.t, *attribute.tensors)
                graphs.extend(g for g in (attribute.g, *attribute.graphs) if g.node)


def _check_place(graph: Path, tensor: TensorProto) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = Path(location)
    plain = location and not name.is_absolute() and ".." not in name.parts and "\\" not in location
    # a store keeps the files of a folder in one place, and links to them all
    folders = graph.parent.resolve(), graph.resolve().parent
    target = (graph.parent / name).resolve()
    if not plain or not any(target.is_relative_to(folder) for folder in folders):
        raise BackendError(
            f"{graph} refers to {location!r} outside its folder for the weights of {tensor.name}: "
            f"do not use this file{_OWN_LINKS if plain else ''}"
        )
    if not target.is_file():
        raise BackendError(f"{graph} needs {location} next to it: copy both files")
    size = math.prod(tensor.dims) * _BYTES.get(tensor.data_type, 0)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError as error:
        raise BackendError(
            f"{graph}: invalid external-data offset for {tensor.name}: {_USE_INTACT}"
        ) from error
    if offset < 0 or length != size or offset + length > target.stat().st_size:
        raise BackendError(
            f"{graph}: {location} is too short for the weights of {tensor.name}, or their size "
            f"differs: {_USE_INTACT}"
        )
