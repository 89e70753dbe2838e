"""Folded adapters as files: the tensors that graphs take from an adapter, under stable names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dualdiff_engine.adapters import AdapterSummary
from dualdiff_engine.adapters.fold import Resident
from dualdiff_engine.base_model import BaseModel, read_json
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError, DualDiffError
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import ADAPTERS, Artefact, BaseOrigin
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import Prompts

PROBE = ".probe.safetensors"
# of a training run, next to its adapter
RECORD = "training.json"


def stored(tensor: Tensor, transposed: bool) -> Tensor:
    """A tensor in the layout of a graph's initializer, or back."""
    return tensor.transpose(-1, -2) if transposed else tensor


def in_precision(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A folded tensor as the graphs read it: the gate's bias is added to fp32 scores."""
    rounded = tensor.to(dtype)
    return rounded.float() if name.endswith("gate_bias") else rounded


def text_names(encoder: TextEncoder) -> set[str]:
    """The text encoder's weights that an adapter may change, whether a given one does or not."""
    parts = ("q_proj", "k_proj", "v_proj", "out_proj")
    return {
        f"{encoder.own_name(layer)}.{part}.weight" for layer in encoder.layers for part in parts
    }


def base_origin(base: BaseModel) -> BaseOrigin:
    """Which base model; of a folder its name alone, for files that travel."""
    source = Path(base.source).name if Path(base.source).is_dir() else base.source
    return BaseOrigin(source, base.sha256)


def trained_prompts(adapter: Path, sha256: str) -> Prompts:
    """What `dualdiff train` recorded next to an adapter file, or the released prompts."""
    path = adapter.parent / RECORD
    try:
        # an adapter that was handed in as tensors has no file
        record = read_json(path) if adapter.name and path.is_file() else {}
        if record["adapter"]["sha256"] == sha256:
            options = record["options"]
            return Prompts(options["image_prompt"], options["anomaly_prompt"])
    except (DualDiffError, KeyError, TypeError):
        # of another program, or of another adapter
        pass
    return Prompts()


def write_adapter(engine: Engine, path: Path, graphs: Mapping[str, Artefact]) -> None:
    """Write the engine's active adapter as the initializers of `graphs`, all of its tensors."""
    adapter, encoder = engine.active, engine.text_encoder
    transposed = {name for artefact in graphs.values() for name in artefact.transposed}
    precision = next(iter(graphs.values())).precision
    base = dict(encoder.encoder.named_parameters())
    text = sorted(text_names(encoder))
    tensors = {
        name: stored(in_precision(name, tensor, getattr(torch, precision)), name in transposed)
        for name, tensor in adapter.sites.items()
    }
    for name in text:
        tensors[name] = stored(adapter.text.get(name, base[name]).float(), name in transposed)
    summary = {**adapter.summary.record(), "file": Path(adapter.summary.file).name}
    prompts = trained_prompts(Path(adapter.summary.file), adapter.summary.sha256)
    metadata = {
        "prompts": asdict(prompts),
        "name": engine.active_adapter,
        "summary": summary,
        "base": asdict(base_origin(engine.base)),
        "precision": precision,
        "text": text,
        "transposed": sorted(transposed & tensors.keys()),
    }
    weight_files.write(path, tensors, metadata)


class FoldedTensors(Mapping[str, Tensor]):
    """Tensors of an adapter file as the engine folds them, each read when asked for."""

    def __init__(self, path: Path, names: list[str], transposed: set[str]) -> None:
        self.path, self._names, self._turned = path, dict.fromkeys(names), transposed

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self.path, "pt") as file:
            return stored(file.get_tensor(name), name in self._turned)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_adapters(folder: Path, graphs: Mapping[str, Artefact]) -> dict[str, Resident]:
    """Every adapter of an export or bundle by name, checked against its graphs."""
    found = {}
    for path in sorted((folder / ADAPTERS).glob("*.safetensors")):
        if not path.name.endswith(PROBE):
            name, adapter = read_adapter(path, graphs)
            found[name] = adapter
    return found


def read_adapter(path: Path, graphs: Mapping[str, Artefact]) -> tuple[str, Resident]:
    """(name, folded adapter) of a file that `dualdiff export` wrote, checked against the graphs.

    Raises BackendError when it was folded for another base model or precision, or lacks tensors.
    """
    metadata, places = weight_files.read_metadata(path), weight_files.places(path)
    one = next(iter(graphs.values()))
    try:
        name, text = str(metadata["name"]), set(metadata["text"])
        summary = AdapterSummary.of(metadata["summary"])
        transposed = set(metadata["transposed"])
        # exports by the first releases do not say
        prompts = Prompts(**metadata.get("prompts", {}))
        claims = {
            "base model": (str(metadata["base"]["sha256"]), one.base.sha256),
            "precision": (str(metadata["precision"]), one.precision),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(
            f"{path} is not a valid folded adapter ({error}): write it with `dualdiff export "
            "adapter`"
        ) from error
    for what, (have, want) in claims.items():
        if have != want:
            raise BackendError(
                f"{path} was folded for another {what} ({have[:12]}) than the graphs next to it "
                f"({want[:12]}): fold the adapter again with `dualdiff export adapter`"
            )
    _check_complete(path, summary.background, set(places), graphs)
    sites = FoldedTensors(path, [n for n in places if n not in text], transposed)
    return name, Resident(summary, sites, FoldedTensors(path, sorted(text), transposed), prompts)


def _check_complete(
    path: Path, background: bool, names: set[str], graphs: Mapping[str, Any]
) -> None:
    needed = ["text_encoder", "denoiser_background" if background else "denoiser"]
    if background:
        needed.append("background_encoder")
    for graph in needed:
        if graph not in graphs:
            raise BackendError(
                f"{path.parent.parent} has no {graph}.onnx, which the adapter {path.stem} needs: "
                "export that adapter again"
            )
        if lacking := sorted(set(graphs[graph].adapter_weights) - names):
            raise BackendError(
                f"{path} has no tensor {lacking[0]}: write it again with `dualdiff export adapter`"
            )
