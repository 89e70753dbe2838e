"""Exported graphs as a `Denoiser`: the calls of the network, another runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dualdiff_engine.errors import AdapterError, BackendError
from dualdiff_engine.export.folder.artefact import Artefact
from dualdiff_engine.export.folder.folded import in_precision, stored
from dualdiff_engine.export.run.onnx_session import Session
from dualdiff_engine.model.coupling import Coupling
from dualdiff_engine.ops import Ops

PLAIN, WITH_BACKGROUND, ENCODER = "denoiser", "denoiser_background", "background_encoder"
TEXT = "text_encoder"


def only(outputs: Sequence[Tensor], shape: tuple[int, ...], path: Path) -> Tensor:
    """The one output of a graph. Raises BackendError when it has another shape."""
    if [tuple(x.shape) for x in outputs] != [shape]:
        got = ", ".join(str(list(x.shape)) for x in outputs) or "nothing"
        raise BackendError(
            f"{path} gives {got} where {list(shape)} is expected: copy the whole folder again, or "
            "export it again"
        )
    return outputs[0]


class Runner(Protocol):
    """A graph ready to run: its inputs by name -> its outputs."""

    def __call__(self, **inputs: Tensor) -> list[Tensor]: ...


class ExportedDenoiser(ABC):
    """A `Denoiser` whose noise exported graphs predict.

    The graphs take timesteps and prompt embeddings as they are. Runners are built when first needed
    and dropped when `load` brings another adapter.
    """

    def __init__(
        self, ops: Ops, artefacts: Mapping[str, Artefact], folder: Path, device: torch.device
    ) -> None:
        """ops: of the engine, whose table says how the graphs run and why."""
        self.ops, self.artefacts, self.folder, self.device = ops, artefacts, folder, device
        self._changed: Mapping[str, Tensor] = {}
        self._main = PLAIN if PLAIN in artefacts else WITH_BACKGROUND
        self._runners: dict[str, Runner] = {}

    @property
    def artefact(self) -> Artefact:
        """Of the graph in use."""
        return self.artefacts[self._main]

    @abstractmethod
    def build(self, graph: str, changed: Mapping[str, Tensor]) -> Runner:
        """A runner of a graph, with other values for these of its initializers."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take another adapter: tensors as from `fold.fold_sites`, read when first needed."""
        trained = any(name.endswith("background_keep") for name in tensors)
        main = WITH_BACKGROUND if trained else PLAIN
        if main not in self.artefacts:
            kind = "with" if trained else "without"
            raise AdapterError(
                f"{self.folder} holds no denoiser for adapters {kind} background: export one of "
                "that kind, and use that folder"
            )
        self._use(main, tensors)
        self._runners.clear()

    def _use(self, main: str, changed: Mapping[str, Tensor]) -> None:
        """Run this graph, with other values for these of its initializers."""
        self._main, self._changed = main, changed

    def release(self) -> None:
        """Drop what runs the graphs."""
        self._runners.clear()

    def time_inputs(self, timesteps: Tensor) -> list[Sequence[Tensor]]:
        """The timesteps themselves, [1] each."""
        return [(timestep.float().reshape(1),) for timestep in timesteps]

    def text_inputs(self, context: Tensor, placeholder: Tensor | None = None) -> list[Tensor]:
        """The prompt embeddings themselves."""
        return [context.float()]

    def couple(self, coupling: Coupling | None) -> None:
        """Graphs hold DualAnoDiff's coupling. Raises BackendError for another one."""
        if coupling is not None:
            raise BackendError(
                "exported graphs couple the branches as DualAnoDiff does, the adapter couples them "
                f"otherwise ({coupling}): load the base model itself"
            )

    def background_shares(
        self, latents: Tensor, time: Sequence[Tensor], text: Sequence[Tensor]
    ) -> list[Tensor]:
        self._check_size(latents)
        run, context = self._runner(ENCODER), text[0][0]
        # the graph takes one background: those of several pairs go through it one by one
        each = latents.unflatten(0, (len(context), -1)).unbind(1)
        shares = [run(latents=x.float(), timestep=time[0], context=context) for x in each]
        if len(shares) == 1:
            return shares[0]
        return [torch.stack(site, 1).flatten(0, 1) for site in zip(*shares, strict=True)]

    def __call__(
        self,
        latents: Tensor,
        time: Sequence[Tensor],
        text: Sequence[Tensor],
        background: Sequence[Tensor] | None = None,
    ) -> Tensor:
        self._check_size(latents)
        self._check_batch(latents.shape[2])
        if (background is None) == (self._main == WITH_BACKGROUND):
            raise BackendError(
                f"{self.folder}/{self._main}.onnx is run with a background exactly when its "
                "adapter was trained with one"
            )
        context, rows, batch = text[0], latents.shape[1], latents.shape[2]
        if batch > 1 and background and len(background[0]) > context.shape[1]:
            # pairs with backgrounds of their own: the graph takes one
            split = [x.unflatten(0, (-1, batch)) for x in background]
            own = [[x[:, pair].contiguous() for x in split] for pair in range(batch)]
            pairs = [self(latents[:, :, n : n + 1], time, text, own[n]) for n in range(batch)]
            return torch.cat(pairs, dim=2)
        if rows == 1:
            return self._call(latents[:, 0], time[0], context, background or ())
        # rows with latents of their own do not meet in the network
        return torch.cat(
            [
                self._call(
                    latents[:, row],
                    time[0],
                    context[:, row : row + 1],
                    [share[row : row + 1] for share in background or ()],
                )
                for row in range(rows)
            ],
            dim=1,
        )

    def _call(
        self, latents: Tensor, timestep: Tensor, context: Tensor, background: Sequence[Tensor]
    ) -> Tensor:
        shares = {f"background_{index}": share for index, share in enumerate(background)}
        run = self._runner(self._main)
        outputs = run(latents=latents.float(), timestep=timestep, context=context, **shares)
        wanted = (2, context.shape[1], *latents.shape[1:])
        return only(outputs, wanted, self.folder / f"{self._main}.onnx")

    def _runner(self, graph: str) -> Runner:
        if graph not in self._runners:
            self._runners[graph] = self.build(
                graph, initializers(self._changed, self.artefacts[graph])
            )
        return self._runners[graph]

    def _check_size(self, latents: Tensor) -> None:
        artefact, size = self.artefact, tuple(latents.shape[-2:])
        if not artefact.dynamic_size and size != (artefact.height, artefact.width):
            raise BackendError(
                f"{self.folder} was exported for latents of {artefact.height} x {artefact.width}, "
                f"got {size[0]} x {size[1]}: pass the size of the export, or export with "
                "--dynamic-size"
            )

    def _check_batch(self, batch: int) -> None:
        if batch > self.artefact.max_batch:
            raise BackendError(
                f"a batch of {batch} is above the {self.artefact.max_batch} that {self.folder} was "
                "exported for: pass a smaller batch, or export with a larger --max-batch"
            )


def initializers(adapter: Mapping[str, Tensor], artefact: Artefact) -> dict[str, Tensor]:
    """A folded adapter's tensors in the precision and layout of a graph's initializers."""
    dtype, transposed = getattr(torch, artefact.precision), set(artefact.transposed)
    changed = {}
    for name in artefact.adapter_weights:
        tensor = adapter[name]
        if artefact.graph != TEXT:
            tensor = in_precision(name, tensor, dtype)
        if artefact.graph == ENCODER and tensor.dim() == 3:
            # the background pass runs the first branch alone
            tensor = tensor[:1]
        changed[name] = stored(tensor, name in transposed)
    return changed


class OnnxDenoiser(ExportedDenoiser):
    """By ONNX Runtime. Another adapter is another session over the same files."""

    def build(self, graph: str, changed: Mapping[str, Tensor]) -> Runner:
        return Session(self.folder / f"{graph}.onnx", self.device, changed)
