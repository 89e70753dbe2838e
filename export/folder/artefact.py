"""The metadata of an exported graph, and the checks on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder import weight_files

if TYPE_CHECKING:
    import onnx_ir as ir

ARTEFACT_FORMAT = 1
# attention is one operator since 23; 18 is the oldest that torch.onnx writes
OPSETS = (18, 19, 20, 21, 22, 23)
PRECISIONS = ("float32", "float16", "bfloat16")
# the folder of folded adapters, next to the graphs
ADAPTERS = "adapters"
# the layout of inputs and outputs in words, for readers of the file without our code
LAYOUTS = {
    "denoiser": "latents [branch, batch, 4, h, w]; context [branch, row, token, width]; noise "
    "[branch, row, batch, 4, h, w]; branches image, anomaly; rows uncond, cond",
    "background_encoder": "latents [row, 4, h, w], noised to the timestep; context of the image "
    "branch [row, token, width]; background_i: keys and values [row, position, 2 width]",
    "text_encoder": "input_ids [prompt, token] -> [prompt, token, width]",
    "vae_decoder": "latent_sample, divided by scaling_factor -> sample in [-1, 1]",
    "vae_encoder": "sample in [-1, 1] -> latent_mean, to be multiplied by scaling_factor",
}
LAYOUTS["denoiser_background"] = LAYOUTS["denoiser"] + "; background_i: from background_encoder"


@dataclass(frozen=True)
class BaseOrigin:
    """Which base model; source: its hub id, or the name of its folder."""

    source: str
    sha256: str


@dataclass(frozen=True)
class AdapterOrigin:
    """Which adapter, by name and by its file's hash."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Artefact:
    """The metadata of one graph.

    height, width: latent size, an example where `dynamic_size`. tokens: the length to which prompts
    are padded; exports by the first releases do not say. transposed: weights stored with
    their last two axes exchanged. adapter_weights: those that another adapter replaces, under the
    same names. adapter: the one whose tensors lie next to the graph. versions: of the packages
    that wrote it.
    """

    graph: str
    precision: str
    opset: int
    max_batch: int
    height: int
    width: int
    dynamic_size: bool
    base: BaseOrigin
    adapter: AdapterOrigin
    layout: str
    scheduler: Mapping[str, Any]
    scaling_factor: float
    versions: Mapping[str, str]
    transposed: list[str] = field(default_factory=list)
    adapter_weights: list[str] = field(default_factory=list)
    tokens: int | None = None
    format: int = ARTEFACT_FORMAT

    @property
    def of_network(self) -> bool:
        """Whether it is a call of the UNet, whose precision is chosen; the others are float32."""
        return self.graph in ("denoiser", "denoiser_background", "background_encoder")

    def write_into(self, model: ir.Model) -> None:
        for name, value in asdict(self).items():
            model.metadata_props[f"dualdiff.{name}"] = json.dumps(value)

    @classmethod
    def read(cls, path: Path) -> tuple[Artefact, onnx.ModelProto]:
        """Read a graph and its metadata, and check them. Raises BackendError."""
        model = weight_files.load_graph(path)
        metadata = {
            entry.key.removeprefix("dualdiff."): entry.value
            for entry in model.metadata_props
            if entry.key.startswith("dualdiff.")
        }
        names = {f.name for f in fields(cls)}
        try:
            values = {name: json.loads(value) for name, value in metadata.items() if name in names}
            values["base"] = BaseOrigin(**values["base"])
            values["adapter"] = AdapterOrigin(**values["adapter"])
            artefact = cls(**values)
            artefact._check_values()
        except (TypeError, ValueError, KeyError) as error:
            raise BackendError(
                f"{path} has no valid metadata of `dualdiff export onnx` ({error}): export the "
                "adapter again"
            ) from error
        if artefact.format != ARTEFACT_FORMAT:
            raise BackendError(
                f"{path} has format {artefact.format}, this release reads "
                f"{ARTEFACT_FORMAT}: export again"
            )
        artefact._check_opset(path, model)
        return artefact, model

    def _check_values(self) -> None:
        """Bounds of what somebody else may have written. Raises ValueError naming the field."""
        sizes = {"height": 1024, "width": 1024, "max_batch": 4096, "tokens": 4096, "opset": 1000}
        texts = (self.base.source, self.base.sha256, self.adapter.name, self.adapter.sha256)
        names = [*self.transposed, *self.adapter_weights]
        fits = {
            **{name: _whole(getattr(self, name), most) for name, most in sizes.items()},
            "tokens": self.tokens is None or _whole(self.tokens, sizes["tokens"]),
            "precision": self.precision in PRECISIONS,
            "dynamic_size": type(self.dynamic_size) is bool,
            "scaling_factor": type(self.scaling_factor) is float and 0 < self.scaling_factor < 1e3,
            "base or adapter": all(isinstance(text, str) for text in (*texts, self.graph)),
            "transposed or adapter_weights": all(isinstance(name, str) for name in names),
            "scheduler": isinstance(self.scheduler, dict),
        }
        if wrong := [name for name, fit in fits.items() if not fit]:
            raise ValueError(f"{wrong[0]} has an invalid value")

    def _check_opset(self, path: Path, model: onnx.ModelProto) -> None:
        found = {opset.domain: opset.version for opset in model.opset_import}.get("")
        if found != self.opset or found not in OPSETS:
            raise BackendError(
                f"{path} has opset {found}, its metadata say {self.opset} (supported: "
                f"{OPSETS[0]} to {OPSETS[-1]}): it was converted; export again"
            )


def _whole(value: object, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def read_artefacts(folder: Path) -> dict[str, Artefact]:
    """Every graph of a folder, checked. Raises BackendError."""
    if not folder.is_dir():
        raise BackendError(f"no folder {str(folder)!r}: create it with `dualdiff export onnx`")
    found = {}
    for path in sorted(folder.glob("*.onnx")):
        artefact, _ = Artefact.read(path)
        if artefact.graph != path.stem:
            raise BackendError(
                f"{path} holds the graph {artefact.graph!r}: it was renamed, rename it back"
            )
        found[artefact.graph] = artefact
    if not found.keys() & {"denoiser", "denoiser_background"}:
        raise BackendError(
            f"{folder} holds no denoiser graph: create it with `dualdiff export onnx`"
        )
    bases = {artefact.base.sha256 for artefact in found.values()}
    if len(bases) > 1:
        raise BackendError(f"{folder} holds graphs of different base models: export again")
    return found
