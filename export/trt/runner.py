"""A denoiser that runs TensorRT engines: buffers bound once, steps as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder.artefact import Artefact
from dualdiff_engine.export.run.denoiser import (
    ENCODER,
    PLAIN,
    ExportedDenoiser,
    initializers,
)
from dualdiff_engine.export.trt import api as tensorrt_api
from dualdiff_engine.export.trt import engine_file
from dualdiff_engine.export.trt.engine_file import Manifest
from dualdiff_engine.files import sha256_of_tensors
from dualdiff_engine.ops import Ops

# by TensorRT's names
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
}
# TensorRT may compile and allocate in the first runs of a shape
WARM_UP = 2


def profile_of(profiles: list[list[int]], batch: int) -> int:
    """The index of the profile that serves a batch. Raises BackendError above all of them."""
    for index, (low, high) in enumerate(profiles):
        if low <= batch <= high:
            return index
    raise BackendError(
        f"a batch of {batch} is above {profiles[-1][1]}, the most that the engine was built for: "
        f"pass a smaller batch or build with --batches …,{batch}"
    )


def must_refit(path: Path, manifest: Manifest, holds: str, wanted: str) -> bool:
    """True if the engine must be refitted; holds, wanted: as by `weights_sha256`.

    Raises BackendError when it must, but was built without refitting.
    """
    if holds == wanted:
        return False
    if not manifest.refittable:
        raise BackendError(
            f"{path} serves only the adapter {manifest.adapter.get('name')!r}, because it was "
            "built without refitting: use that adapter or build with --refit"
        )
    return True


@dataclass
class _Bound:
    """Buffers of one shape, and the captured run over them."""

    inputs: dict[str, Tensor]
    outputs: list[Tensor]
    graph: Any


class TensorrtRunner:
    """One engine file on one GPU.

    Raises BackendError when the file is not for this machine, not trusted, or does not load.
    """

    def __init__(self, path: Path, flavour: str, device: torch.device, *, trust: bool) -> None:
        self.trt, self.path, self.device = tensorrt_api.package(flavour), path, device
        self.manifest, plan = engine_file.read(
            path, flavour, str(self.trt.__version__), trust=trust
        )
        self.logger = tensorrt_api.logger(self.trt)
        with torch.cuda.device(device):
            # it owns what it deserialises
            self.runtime = self.trt.Runtime(self.logger)
            self.engine = self.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise self._error("could not be loaded")
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.trt.TensorIOMode.INPUT
        self.inputs = [name for name in names if self.engine.get_tensor_mode(name) == mode]
        self.outputs = [name for name in names if name not in self.inputs]
        self._holds = self.manifest.weights_sha256
        self._contexts: dict[int, Any] = {}
        self._bound: dict[tuple[torch.Size, ...], _Bound] = {}

    @torch.inference_mode()
    def __call__(self, **inputs: Tensor) -> list[Tensor]:
        given = {name: inputs[name] for name in self.inputs}
        key = tuple(x.shape for x in given.values())
        if key not in self._bound:
            self._bound[key] = self._bind(given)
        bound = self._bound[key]
        for name, tensor in given.items():
            bound.inputs[name].copy_(tensor)
        bound.graph.replay()
        # the next replay writes over them
        return [x.clone() for x in bound.outputs]

    def refit(self, weights: Mapping[str, Tensor]) -> None:
        """Hold these weights, by the names of the graph's initializers. Raises BackendError."""
        wanted = sha256_of_tensors(weights)
        if not must_refit(self.path, self.manifest, self._holds, wanted):
            return
        refitter = self.trt.Refitter(self.engine, self.logger)
        known = set(refitter.get_all_weights())
        if absent := sorted(set(weights) - known):
            raise BackendError(
                f"{self.path} has no refittable weight {absent[0]}: build it again with "
                "`dualdiff export tensorrt`"
            )
        # TensorRT reads these until it is done
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        for name, tensor in held.items():
            values = self.trt.Weights(self._type(tensor.dtype), tensor.data_ptr(), tensor.numel())
            refitter.set_named_weights(name, values, self.trt.TensorLocation.HOST)
        torch.cuda.synchronize(self.device)
        if not refitter.refit_cuda_engine():
            raise self._error("could not be refitted")
        self._holds = wanted
        # captured runs may hold what the old weights were compiled into
        self._bound.clear()
        self._contexts.clear()

    def _bind(self, given: Mapping[str, Tensor]) -> _Bound:
        latents = given["latents"]
        # the background's graph has no pairs
        paired = self.manifest.graph != "background_encoder"
        index = profile_of(self.manifest.profiles, latents.shape[1]) if paired else 0
        with torch.cuda.device(self.device):
            context = self._context(index)
            inputs = {
                name: torch.empty(x.shape, dtype=self._dtype(name), device=self.device)
                for name, x in given.items()
            }
            for name, x in inputs.items():
                if not context.set_input_shape(name, tuple(x.shape)):
                    raise self._error(f"does not take {name} of {list(x.shape)}")
                context.set_tensor_address(name, x.data_ptr())
            outputs = []
            for name in self.outputs:
                shape = tuple(context.get_tensor_shape(name))
                outputs.append(torch.empty(shape, dtype=self._dtype(name), device=self.device))
                context.set_tensor_address(name, outputs[-1].data_ptr())
            for name, x in given.items():
                inputs[name].copy_(x)
            return _Bound(inputs, outputs, self._capture(context))

    def _capture(self, context: Any) -> Any:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                if not context.execute_async_v3(side.cuda_stream):
                    raise self._error("failed to run")
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
        return graph

    def _context(self, index: int) -> Any:
        """One per profile: a profile cannot change under a captured run."""
        if index not in self._contexts:
            context = self.engine.create_execution_context()
            stream = torch.cuda.current_stream().cuda_stream
            if context is None or not context.set_optimization_profile_async(index, stream):
                raise self._error(f"has no room to run profile {index}")
            torch.cuda.current_stream().synchronize()
            self._contexts[index] = context
        return self._contexts[index]

    def _dtype(self, name: str) -> torch.dtype:
        return _DTYPES[self.engine.get_tensor_dtype(name).name]

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self.trt.DataType, {d: name for name, d in _DTYPES.items()}[dtype])

    def _error(self, what: str) -> BackendError:
        said = "; ".join(self.logger.errors) or "TensorRT did not say why"
        return BackendError(f"{self.path} {what}: {said}")


def engine_for(folder: Path, graph: str) -> Path:
    """The engine file of a graph for the current GPU. Raises BackendError when there is none."""
    here = engine_file.this_gpu().replace(".", "")
    for path in sorted(folder.glob(f"{graph}.sm_*.plan")):
        targets = path.name.removeprefix(f"{graph}.sm_").removesuffix(".plan").split("_")
        if here in targets:
            return path
    raise BackendError(
        f"{folder} holds no TensorRT engine of {graph} for compute capability "
        f"{engine_file.this_gpu()}: build it here with `dualdiff export tensorrt {folder}`"
    )


class TensorrtDenoiser(ExportedDenoiser):
    """By TensorRT. Another adapter is another set of weights in the same engines."""

    def __init__(
        self,
        ops: Ops,
        artefacts: Mapping[str, Artefact],
        folder: Path,
        device: torch.device,
        *,
        flavour: str,
        trust: bool = False,
    ) -> None:
        super().__init__(ops, artefacts, folder, device)
        self.flavour, self.trust = flavour, trust

    def build(self, graph: str, changed: Mapping[str, Tensor]) -> TensorrtRunner:
        path = engine_for(self.folder, graph)
        runner = TensorrtRunner(path, self.flavour, self.device, trust=self.trust)
        if changed:
            runner.refit(changed)
        return runner

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """As ExportedDenoiser's; engines that are loaded stay, with the new weights.

        If one cannot be refitted, the adapter before stays the one in use.
        """
        loaded, before = dict(self._runners), (self._main, self._changed)
        super().load(tensors)
        try:
            for graph, runner in loaded.items():
                assert isinstance(runner, TensorrtRunner)
                # the other kind's graphs, with or without background, are not this adapter's
                if graph == self._main or (graph == ENCODER and self._main != PLAIN):
                    runner.refit(initializers(tensors, self.artefacts[graph]))
                    self._runners[graph] = runner
        except Exception:
            # what was refitted holds the new weights: engines are read again when needed
            self._runners.clear()
            self._use(*before)
            raise
