"""Draws batches of a job's pairs with the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from dualdiff_engine.dataset.inputs import Source, base_of, sources
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.plan import Task
from dualdiff_engine.device import is_device_lost
from dualdiff_engine.pair import Fault, Pair


class Painter(Protocol):
    """What a worker draws with. batch: most pairs at once. device: its name."""

    batch: int
    device: str

    def draw(
        self, tasks: Sequence[Task], beat: Callable[[], None], on_fault: Callable[[Fault], None]
    ) -> Iterator[Callable[[], Pair]]:
        """What makes each pair, in any thread; tasks are of one defect. beat: after every step."""
        ...

    def interrupt(self) -> None:
        """End the batch after its step; from any thread."""
        ...

    def lost(self, error: Exception) -> bool:
        """Whether after this error only another process can use the device."""
        ...


class EnginePainter:
    """An engine that holds the adapter of the last defect. Raises as `Engine.from_pretrained`."""

    def __init__(self, job: Job, device: str) -> None:
        from dualdiff_engine.engine import Engine

        self._job = job
        self._sources = {source.name: source for source in sources(job)}
        chosen, batch = job.engine, job.limits.batch
        _limit_memory(job.limits.vram, device)
        self._engine = Engine.from_pretrained(
            base_of(job),
            dtype=chosen.dtype,
            device=device,
            backend=chosen.backend,
            tune=chosen.tune,
            max_batch=None if batch == "auto" else batch,
            local_files_only=chosen.offline,
        )
        self.batch, self.device = self._engine.max_batch, str(self._engine.device)

    def draw(
        self, tasks: Sequence[Task], beat: Callable[[], None], on_fault: Callable[[Fault], None]
    ) -> Iterator[Callable[[], Pair]]:
        """See `Painter`."""
        source = self._sources[tasks[0].defect]
        self._activate(source)

        def stepped(*_: Any) -> None:
            beat()

        return self._engine.unfinished(
            [task.seed(self._job.seed) for task in tasks],
            sampling=source.sampling,
            batch=len(tasks),
            prompts=source.prompts,
            mask=source.spec.mask,
            callback=stepped,
            on_fault=on_fault,
            **self._pictures(source, tasks),
        )

    def interrupt(self) -> None:
        """See `Painter`."""
        self._engine.interrupt()

    def lost(self, error: Exception) -> bool:
        """See `Painter`."""
        return is_device_lost(error, self._engine.device)

    def _activate(self, source: Source) -> None:
        if self._engine.active_adapter == source.name:
            return
        # two of them may not fit; a pair is drawn for longer than an adapter is folded
        for name in self._engine.adapters:
            self._engine.unload_adapter(name)
        self._engine.load_adapter(
            source.adapter, source.name, allow_pickle=self._job.engine.allow_pickle
        )

    def _pictures(self, source: Source, tasks: Sequence[Task]) -> dict[str, Any]:
        """The arguments that say what pairs are drawn on."""
        if not source.pictures:
            return {}
        numbers = [source.picture_of(task.number) for task in tasks]
        trained = self._engine.active.summary.background
        background = source.as_background(trained)
        make: Callable[[Any], Any] = source.background if background else source.placement
        made = {number: make(source.pictures[number]) for number in set(numbers)}
        chosen = [made[number] for number in numbers]
        several = chosen if len(made) > 1 else chosen[0]
        return {"background" if background else "placement": several}


def _limit_memory(limit: int | None, device: str) -> None:
    """Let PyTorch take no more of a GPU than so many bytes."""
    if limit is None or not device.startswith("cuda"):
        return
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
