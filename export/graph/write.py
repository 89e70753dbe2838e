"""Engine -> a folder of validated ONNX graphs, the base's weights, and folded adapters.

denoiser.onnx, denoiser_background.onnx, background_encoder.onnx    as its adapters need them
text_encoder.onnx, vae_decoder.onnx, vae_encoder.onnx
network.safetensors, text_encoder.safetensors, vae_….safetensors    the base model's weights
adapters/NAME.safetensors    what an adapter changes: the same tensors in each
adapters/NAME.probe.safetensors    inputs, and what the engine's own network made of them
report.json    how far every graph is from the engine's own network
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.export.folder import folded, weight_files
from dualdiff_engine.export.folder.artefact import (
    ADAPTERS,
    LAYOUTS,
    PRECISIONS,
    AdapterOrigin,
    Artefact,
    read_artefacts,
)
from dualdiff_engine.export.folder.folded import stored
from dualdiff_engine.export.folder.weight_files import Place
from dualdiff_engine.export.graph import (
    exchange_operator as exchange,
)
from dualdiff_engine.export.graph import (
    modules as graphs,
)
from dualdiff_engine.export.graph import (
    space,
    validate,
)
from dualdiff_engine.export.graph.modules import Graph, Size
from dualdiff_engine.export.graph.progress import Say, part
from dualdiff_engine.export.graph.trace import Traced, check_opset, trace
from dualdiff_engine.pair import versions

NETWORK = "network.safetensors"
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Args:
        precision: float32, float16 or bfloat16, of denoiser and background encoder. Text encoder
            and VAE stay in float32, because half precision overflows there.
        opset: of ONNX, 18 to 23; 23 keeps attention as one operator.
        height: in pixels; None takes the base's own size.
        width: in pixels; None takes the base's own size.
        dynamic_size: height and width are examples, other sizes fit too.
        max_batch: largest batch of pairs at run time, 1 to 4096.
        batches: batch sizes used for validation.
        exchange_operator: keep the exchange as one operator, see `graph.exchange_operator`.

    Raises:
        SettingsError: a value is out of its range.
    """

    precision: str = "float32"
    opset: int = 23
    height: int | None = None
    width: int | None = None
    dynamic_size: bool = False
    max_batch: int = 64
    batches: tuple[int, ...] = (1, 2, 3)
    exchange_operator: bool = False

    def __post_init__(self) -> None:
        check_opset(self.opset)
        if self.precision not in PRECISIONS:
            raise SettingsError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        if not 1 <= self.max_batch <= 4096:
            raise SettingsError(f"max_batch must be from 1 to 4096, got {self.max_batch!r}")
        if not self.batches or not all(1 <= b <= self.max_batch for b in self.batches):
            raise SettingsError(
                f"batches for validation must be from 1 to {self.max_batch}, got {self.batches!r}"
            )


def export_onnx(
    engine: Engine,
    out: str | Path,
    options: ExportOptions | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Export an engine's networks as ONNX, with every resident adapter.

    Every graph is run by ONNX Runtime and compared with the engine's own network. If one misses its
    tolerance, nothing is kept.

    Args:
        engine: in float32 on the CPU, with an active adapter.
        out: the new folder, absent or empty; it gets its name when all went well.
        options: see `Options`; by default float32, opset 23.
        say: called with lines of progress: what is needed and free, each part's begin and end.

    Returns:
        The report, as in `report.json`: per graph its nodes, and per adapter its errors (relative
        L2) and tolerance.

    Raises:
        SettingsError: wrong options, another dtype or device, or `out` is not empty.
        OutputError: the disk has less room than the export may take.
        BackendError: a graph differs from the engine's network by more than its tolerance.
    """
    with new_folder(Path(out)) as folder:
        return write_folder(engine, folder, options or ExportOptions(), say)


def write_folder(engine: Engine, folder: Path, options: ExportOptions, say: Say) -> dict[str, Any]:
    """`export_onnx` into a folder that is there. The engine's active adapter comes first."""
    if engine.dtype != torch.float32 or engine.device.type != "cpu":
        raise SettingsError(
            "export needs an engine in float32 on the CPU, because it validates against it"
        )
    for name in engine.adapters:
        if (coupling := engine.resident(name).summary.coupling) is not None:
            raise SettingsError(
                f"adapter {name!r} cannot be exported: graphs couple the branches as DualAnoDiff "
                f"does, it couples them otherwise ({coupling}); run it with the engine itself"
            )
    active = engine.active_adapter
    names = sorted(engine.adapters, key=lambda name: name != active)
    report: dict[str, Any] = {}
    needed = 0
    try:
        exporters = []
        for name in names:
            engine.set_adapter(name)
            exporters.append(Exporter(engine, folder, options, say))
            needed += exporters[-1].expected_bytes(with_base=len(exporters) == 1)
        space.require(folder, needed, say)
        for name, exporter in zip(names, exporters, strict=True):
            engine.set_adapter(name)
            report = exporter.add_adapter()
    finally:
        if active is not None:
            engine.set_adapter(active)
    return report


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that takes the name `out` once all went well. Raises SettingsError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingsError(f"{out} exists and is not empty: choose a new folder")
    if not out.parent.is_dir():
        raise SettingsError(f"no folder {str(out.parent)!r} for {out.name}: create it first")
    working = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield working
        working.chmod(0o755)
        if out.exists():
            out.rmdir()
        working.rename(out)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def file_name(adapter: str) -> str:
    """An adapter's name as one that every file system takes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", adapter).strip(".-")[:100] or "adapter"


class Exporter:
    """Adds the engine's active adapter to a folder, and the graphs that it needs."""

    def __init__(self, engine: Engine, folder: Path, options: ExportOptions, say: Say) -> None:
        self.engine, self.folder, self.options, self.say = engine, folder, options, say
        self.name = file_name(engine.active_adapter or "")
        self.background = engine.active.summary.background
        self.dtype: torch.dtype = getattr(torch, options.precision)
        self.size = self._size()

    def _size(self) -> Size:
        engine, options = self.engine, self.options
        step = engine.base.pixels_per_latent
        own = engine.base.picture_size
        height, width = options.height or own[0], options.width or own[1]
        if height % step or width % step:
            raise SettingsError(f"height and width must be multiples of {step} for this VAE")
        tokens = engine.text_encoder.tokenizer.model_max_length
        return Size(height // step, width // step, options.dynamic_size, tokens)

    def expected_bytes(self, *, with_base: bool) -> int:
        """At most what the adapter takes on the disk, `with_base` also weights and graphs."""
        base = space.base_bytes(self.engine, self.dtype) if with_base else 0
        return base + space.adapter_bytes(self.engine, self.dtype, self.size)

    def add_adapter(self) -> dict[str, Any]:
        """Write, validate; returns the report.

        Raises BackendError when a graph misses its tolerance.
        """
        fresh = self.write()
        return validate.validate(
            self.engine, self.folder, self.name, self.options.batches, fresh, self.say
        )

    def write(self, only: Collection[str] | None = None) -> set[str]:
        """Trace and write what is not there yet, or of that `only` these; returns which."""
        (self.folder / ADAPTERS).mkdir(exist_ok=True)
        there = {path.stem for path in self.folder.glob("*.onnx")}
        makers = {
            name: make
            for name, make in self._makers().items()
            if name not in there and (only is None or name in only)
        }
        traced = {}
        for name, make in makers.items():
            with part(self.say, f"tracing {name}"):
                graph = make()
                traced[name] = graph, trace(graph, self.options.opset)
        if traced:
            self._write_base(traced)
        file = self.folder / ADAPTERS / f"{self.name}.safetensors"
        known = {name: self._about(graph, t) for name, (graph, t) in traced.items()}
        if there:
            known |= read_artefacts(self.folder)
        with part(self.say, "writing the adapter", file):
            folded.write_adapter(self.engine, file, known)
        for graph, translated in traced.values():
            self._write_graph(graph, translated, known[graph.name])
        return set(makers)

    def _makers(self) -> dict[str, Callable[[], Graph]]:
        """What this adapter needs."""
        engine, size, background = self.engine, self.size, self.background
        text, vae, scale = engine.text_encoder, engine.vae, engine.base.pixels_per_latent

        def network(branches: int) -> Any:
            own = exchange.as_operator if self.options.exchange_operator else None
            return graphs.empty_network(
                engine.base.unet_config, self.dtype, background, branches, own
            )

        makers: dict[str, Callable[[], Graph]] = {
            "denoiser_background" if background else "denoiser": lambda: graphs.denoiser_graph(
                network(2), size, background=background
            ),
            "text_encoder": lambda: graphs.text_graph(
                text.encoder, text.tokenizer.model_max_length
            ),
            "vae_decoder": lambda: graphs.decoder_graph(vae, size),
            # of backgrounds and placements: 34 million parameters in Stable Diffusion, 137 MB
            "vae_encoder": lambda: graphs.encoder_graph(vae, size, scale),
        }
        if background:
            makers["background_encoder"] = lambda: graphs.background_graph(network(1), size)
        return makers

    def _write_base(self, traced: Mapping[str, tuple[Graph, Traced]]) -> None:
        """The weights that no adapter changes, a file per part of the base model."""
        origin = asdict(folded.base_origin(self.engine.base))
        with part(self.say, "writing weights") as written:
            for file, tensors in self._missing(traced).items():
                weight_files.write(self.folder / file, tensors, {"base": origin})
                written.append(self.folder / file)

    def _missing(self, traced: Mapping[str, tuple[Graph, Traced]]) -> dict[str, dict[str, Tensor]]:
        """By file that is not there yet, the tensors that graphs read from it."""
        files: dict[str, dict[str, Tensor]] = {}
        for graph, translated in traced.values():
            for name, transposed in translated.weights.items():
                file = self._base_file(graph.name, name)
                if file is not None and not (self.folder / file).exists():
                    tensor = stored(self._base_tensor(graph.name, name), transposed)
                    # what two graphs read is stored as the first reads it
                    files.setdefault(file, {}).setdefault(name, tensor)
        return files

    def _base_file(self, graph: str, name: str) -> str | None:
        """Where a weight of the base lies; None for what belongs to adapters."""
        if graph == "text_encoder":
            encoder = self.engine.text_encoder
            changed = folded.text_names(encoder)
            return None if name in changed else f"{graph}.safetensors"
        if graph.startswith("vae"):
            return f"{graph}.safetensors"
        return None if name in self.engine.active.sites else NETWORK

    def _base_tensor(self, graph: str, name: str) -> Tensor:
        if graph == "text_encoder":
            parameter: Tensor = self.engine.text_encoder.encoder.get_parameter(name)
            return parameter.float()
        if graph.startswith("vae"):
            weight: Tensor = self.engine.vae.get_parameter(name)
            return weight.float()
        return self.engine.unet.get_parameter(name).to(self.dtype)

    def _write_graph(self, graph: Graph, traced: Traced, about: Artefact) -> None:
        """Turn the weights back into initializers, with their values in the files."""
        model, places = traced.model, self._places()
        for value in [v for v in model.graph.inputs if v.name in traced.weights]:
            name, shape, dtype = value.name or "", value.shape, value.dtype
            assert shape is not None
            assert dtype is not None
            file = self._base_file(graph.name, name) or f"{ADAPTERS}/{self.name}.safetensors"
            length = math.prod(shape.numpy()) * int(dtype.itemsize)
            model.graph.inputs.remove(value)
            # the first branch's part of a tensor of both lies at its beginning
            value.const_value = ir.ExternalTensor(
                file, places[file][name].offset, length, dtype,
                shape=shape, name=name, base_dir=self.folder,
            )  # fmt: skip
            model.graph.register_initializer(value)
        # torch stores the call stack of the exporting machine in every node
        common.ClearMetadataAndDocStringPass()(model)
        about.write_into(model)
        proto = exchange.with_body(ir.to_proto(model))
        path = self.folder / f"{graph.name}.onnx"
        with part(self.say, f"writing {graph.name}", path):
            onnx.save(proto, path)
        with part(self.say, f"checking {graph.name}"):
            onnx.checker.check_model(str(path), full_check=True)

    def _places(self) -> dict[str, dict[str, Place]]:
        files = self.folder.rglob("*.safetensors")
        return {
            path.relative_to(self.folder).as_posix(): weight_files.places(path) for path in files
        }

    def _about(self, graph: Graph, traced: Traced) -> Artefact:
        engine, options, size = self.engine, self.options, self.size
        base, summary = engine.base, engine.active.summary
        return Artefact(
            graph=graph.name,
            precision=options.precision,
            opset=options.opset,
            max_batch=options.max_batch,
            height=size.height,
            width=size.width,
            dynamic_size=size.dynamic,
            base=folded.base_origin(base),
            adapter=AdapterOrigin(str(engine.active_adapter), summary.sha256),
            layout=LAYOUTS[graph.name],
            # the base reads its class apart from its values
            scheduler={"_class_name": type(base.scheduler).__name__, **base.scheduler.config},
            scaling_factor=float(engine.vae.config.scaling_factor),
            versions={**versions(), "onnx": onnx.__version__},
            transposed=[name for name, transposed in traced.weights.items() if transposed],
            tokens=size.tokens,
            adapter_weights=[n for n in traced.weights if self._base_file(graph.name, n) is None],
        )
