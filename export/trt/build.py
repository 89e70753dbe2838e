"""ONNX graphs -> TensorRT engines: strongly typed, refittable, one profile per range of batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder.artefact import Artefact, read_artefacts
from dualdiff_engine.export.folder.folded import read_adapters
from dualdiff_engine.export.graph import exchange_operator
from dualdiff_engine.export.run.denoiser import initializers
from dualdiff_engine.export.trt import api as tensorrt_api
from dualdiff_engine.export.trt import engine_file, exchange_plugin
from dualdiff_engine.export.trt.engine_file import Manifest
from dualdiff_engine.files import sha256_of, sha256_of_tensors

WITH_EXCHANGE = ("denoiser", "denoiser_background")
GRAPHS = (*WITH_EXCHANGE, "background_encoder")
# names of dynamic axes in our graphs
BATCH, ROWS = "batch", "rows"
GUIDED = 2
Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """How to build.

    Args:
        flavour: `tensorrt` or `tensorrt-rtx`; empty takes the one that is installed.
        targets: compute capabilities such as "8.9" that RTX compiles for ahead of time; empty takes
            this machine's GPU.
        batches: ascending upper ends of the ranges of batch sizes; each range is a profile, tuned
            at its end.
        refittable: keep the adapter's weights replaceable. By default True if there is a GPU;
            without one RTX cannot build such engines.
        exchange_plugin: run the exchange with our Triton kernel, see `trt.exchange_plugin`.

    Raises:
        SettingsError: a value is out of its range, or does not fit the flavour.
    """

    flavour: str = ""
    targets: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8, 32, 64)
    refittable: bool | None = None
    exchange_plugin: bool = False

    def __post_init__(self) -> None:
        if not self.batches or list(self.batches) != sorted(set(self.batches)):
            raise SettingsError(f"batches must be ascending, such as 1,8,32,64; got {self.batches}")
        if self.batches[0] < 1:
            raise SettingsError(f"batches must be at least 1; got {self.batches[0]}")
        if self.targets and self.flavour == "tensorrt":
            raise SettingsError(
                "targets need tensorrt-rtx; TensorRT builds only for this machine's GPU"
            )

    @property
    def refits(self) -> bool:
        if self.refittable is None:
            return bool(engine_file.this_gpu(required=False))
        return self.refittable

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(least, most) pairs of each profile."""
        return [(low + 1, high) for low, high in pairwise((0, *self.batches))]


@dataclass
class Built:
    """The result of building a graph; attentions: how many run as one fused kernel."""

    graph: str
    seconds: float
    plan_bytes: int
    attentions: int
    file: str
    profiles: list[tuple[int, int]]
    refittable: bool


def build(
    exported: str | Path, options: BuildOptions | None = None, say: Say = lambda line: None
) -> list[Built]:
    """Build a TensorRT engine for every denoiser graph of an export, next to the graphs.

    Args:
        exported: a folder by `export_onnx` or `write_bundle`, of static size, in float16 or
            bfloat16.
        options: see `BuildOptions`.
        say: called with one line of progress per phase.

    Returns:
        One result per graph: file, seconds, bytes, profiles.

    Raises:
        SettingsError: the export has a dynamic size or float32, or options do not fit it.
        BackendError: TensorRT is missing or fails; the message holds TensorRT's own.
    """
    options, folder = options or BuildOptions(), Path(exported)
    flavour = options.flavour or tensorrt_api.installed()
    trt = tensorrt_api.package(flavour)
    artefacts = read_artefacts(folder)
    targets = options.targets or (engine_file.this_gpu(),)
    graphs = [name for name in GRAPHS if name in artefacts]
    for name in graphs:
        _check(artefacts[name], folder, options)
    if options.exchange_plugin:
        _take_plugin(flavour, folder, graphs, targets)
    built = []
    for name in graphs:
        say(f"{name}: building for {', '.join(targets)}")
        maker = _Builder(trt, flavour, folder, artefacts[name], targets, options, say)
        built.append(maker.run())
        say(f"{name}: {built[-1].plan_bytes / 2**20:.0f} MiB in {built[-1].seconds:.0f} s")
    return built


def _check(artefact: Artefact, folder: Path, options: BuildOptions) -> None:
    if artefact.dynamic_size:
        raise SettingsError(
            f"{folder} was exported with --dynamic-size: export each size that you need without it"
        )
    if artefact.precision == "float32":
        raise SettingsError(
            f"{folder} was exported in float32, but TensorRT has no fused attention for float32: "
            "export with --precision float16 or bfloat16"
        )
    if options.batches[-1] > artefact.max_batch:
        raise SettingsError(
            f"batches go up to {options.batches[-1]}, the export up to {artefact.max_batch}: pass "
            "smaller batches or export with a larger --max-batch"
        )


def _take_plugin(flavour: str, folder: Path, graphs: Sequence[str], targets: Sequence[str]) -> None:
    """Register the exchange's kernel, having checked that the graphs ask for it."""
    if flavour != "tensorrt":
        raise SettingsError(
            f"{flavour} does not support plugins: use tensorrt or build without the plugin"
        )
    for name in graphs:
        if name in WITH_EXCHANGE:
            exchange_plugin.check_graph(folder / f"{name}.onnx")
    (here,) = targets
    exchange_plugin.register(here)


class _Builder:
    """One graph, from file to file."""

    def __init__(
        self,
        trt: Any,
        flavour: str,
        folder: Path,
        artefact: Artefact,
        targets: Sequence[str],
        options: BuildOptions,
        say: Say = lambda line: None,
    ) -> None:
        self.trt, self.flavour, self.folder = trt, flavour, folder
        self.artefact, self.targets, self.options = artefact, tuple(targets), options
        self.logger = tensorrt_api.logger(trt)
        self.builder = trt.Builder(self.logger)
        graph = artefact.graph
        self.progress = tensorrt_api.progress(trt, lambda line: say(f"{graph}: {line}"))

    def run(self) -> Built:
        start = time.monotonic()
        # before the minutes of a build: an adapter's file may be damaged
        weights = sha256_of_tensors(self._adapter_weights())
        network = self._parse()
        plugins = exchange_plugin.taken(self.trt, network, self._exchanges())
        config = self._config(network)
        plan = self.builder.build_serialized_network(network, config)
        if plan is None:
            raise self._error("could not be built")
        self._keep_timings(config)
        attentions = sum(
            network.get_layer(i).type == self.trt.LayerType.ATTENTION_INPUT
            for i in range(network.num_layers)
        )
        path = engine_file.write(
            self.folder,
            bytes(memoryview(plan)),
            self._manifest(network, weights, plugins),
            self.targets,
        )
        seconds = time.monotonic() - start
        ranges = self._ranges(network)
        return Built(
            self.artefact.graph, seconds, plan.nbytes, attentions, path.name, ranges,
            self.options.refits,
        )  # fmt: skip

    def _parse(self) -> Any:
        trt, path = self.trt, self.folder / f"{self.artefact.graph}.onnx"
        flags = trt.NetworkDefinitionCreationFlag
        # the only kind since 11, whose enumeration no longer names it
        typed = getattr(flags, "STRONGLY_TYPED", None)
        network = self.builder.create_network(0 if typed is None else 1 << int(typed))
        parser = trt.OnnxParser(network, self.logger)
        # by path: weights lie in files next to the graph
        if not parser.parse_from_file(str(path)):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise BackendError(f"{self.flavour} could not parse {path}: {errors}")
        return network

    def _config(self, network: Any) -> Any:
        trt, config = self.trt, self.builder.create_builder_config()
        config.progress_monitor = self.progress
        if self.options.refits:
            config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
            self._mark(network)
        if self.flavour == "tensorrt-rtx":
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                config.set_compute_capability(_capability(trt, target), index)
        elif (cache := self.folder / engine_file.TIMING_CACHE).is_file():
            config.set_timing_cache(config.create_timing_cache(cache.read_bytes()), False)
        for low, high in self._ranges(network):
            profile = self.builder.create_optimization_profile()
            for tensor in _dynamic(network):
                profile.set_shape(
                    tensor.name, *(_shape(tensor, n, rows) for n, rows in self._points(low, high))
                )
            config.add_optimization_profile(profile)
        return config

    def _mark(self, network: Any) -> None:
        """Only what an adapter brings stays replaceable: the rest may be folded and fused."""
        for name in self.artefact.adapter_weights:
            if not network.mark_weights_refittable(name):
                raise BackendError(
                    f"{self.flavour} has no weight {name} of {self.artefact.graph}.onnx: export it "
                    "again"
                )

    def _ranges(self, network: Any) -> list[tuple[int, int]]:
        """A graph without pairs, the background's, needs one profile."""
        names = {name for tensor in _dynamic(network) for name in _axes(tensor).values()}
        return self.options.ranges if BATCH in names else self.options.ranges[:1]

    def _points(self, low: int, high: int) -> list[tuple[int, int]]:
        """(pairs, guidance rows) at least, at best, at most."""
        return [(low, 1), (high, GUIDED), (high, GUIDED)]

    def _keep_timings(self, config: Any) -> None:
        """Kernels that were timed once need not be again. RTX times none at build."""
        cache = config.get_timing_cache() if self.flavour == "tensorrt" else None
        if cache is not None:
            (self.folder / engine_file.TIMING_CACHE).write_bytes(
                bytes(memoryview(cache.serialize()))
            )

    def _exchanges(self) -> int:
        """How many a plugin is to take."""
        if not self.options.exchange_plugin:
            return 0
        return len(exchange_operator.nodes_of(self.folder / f"{self.artefact.graph}.onnx"))

    def _manifest(self, network: Any, weights: str, plugins: list[str]) -> Manifest:
        a = self.artefact
        return Manifest(
            graph=a.graph,
            flavour=self.flavour,
            version=str(self.trt.__version__),
            targets=list(self.targets),
            gpu="" if self.options.targets else engine_file.this_gpu_name(),
            graph_sha256=sha256_of(self.folder / f"{a.graph}.onnx"),
            base=asdict(a.base),
            adapter=asdict(a.adapter),
            precision=a.precision,
            height=a.height,
            width=a.width,
            profiles=[list(pair) for pair in self._ranges(network)],
            refittable=self.options.refits,
            weights_sha256=weights,
            plugins=plugins,
        )

    def _adapter_weights(self) -> dict[str, Any]:
        """The values in the graph, as a runner gets them for its adapter."""
        adapters = read_adapters(self.folder, read_artefacts(self.folder))
        return initializers(adapters[self.artefact.adapter.name].sites, self.artefact)

    def _error(self, what: str) -> BackendError:
        errors = "; ".join(self.logger.errors) or "no reason given"
        if self.options.refits and not engine_file.this_gpu(required=False):
            errors += " (refittable engines need a GPU at build time: leave refittable out)"
        return BackendError(f"{self.artefact.graph}.onnx {what} with {self.flavour}: {errors}")


def _dynamic(network: Any) -> list[Any]:
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    return [tensor for tensor in tensors if -1 in tuple(tensor.shape)]


def _axes(tensor: Any) -> dict[int, str]:
    return {
        axis: tensor.get_dimension_name(axis)
        for axis, size in enumerate(tuple(tensor.shape))
        if size == -1
    }


def _shape(tensor: Any, batch: int, rows: int) -> list[int]:
    """Raises BackendError for an axis that our graphs do not have."""
    sizes: Mapping[str, int] = {BATCH: batch, ROWS: rows}
    axes = _axes(tensor)
    if unknown := [name for name in axes.values() if name not in sizes]:
        raise BackendError(
            f"input {tensor.name} has an unknown axis {unknown[0]!r}: export the graph again"
        )
    return [sizes[axes[i]] if i in axes else size for i, size in enumerate(tuple(tensor.shape))]


def _capability(trt: Any, target: str) -> Any:
    """Of RTX, for "8.9"; a GPU that its enumeration does not name is built for where it is."""
    found = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
    if found is not None:
        return found
    if target == engine_file.this_gpu(required=False):
        return trt.ComputeCapability.CURRENT
    known = [name for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    raise BackendError(
        f"tensorrt-rtx {trt.__version__} cannot build for compute capability {target}: choose "
        f"one of {', '.join(f'{n[2:-1]}.{n[-1]}' for n in known)}"
    )
