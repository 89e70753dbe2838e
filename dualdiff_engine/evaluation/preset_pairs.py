"""Pairs of the same seeds, drawn with different samplings, and their latents.

A folder per sampling, as `dualdiff generate` writes it, with `latents/SEED.npy` added. What a
folder holds is not drawn again.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import DataError
from dualdiff_engine.evaluation.data import Sample, find_pairs
from dualdiff_engine.files import write_whole
from dualdiff_engine.folder_writer import FolderWriter
from dualdiff_engine.settings import (
    PRESETS,
    RELEASED,
    Background,
    ChosenSampling,
    Prompts,
    Sampling,
)

CONVERGED = "converged"
LATENTS = "latents"
# the sampler of the released program: PNDM as SD-1.5 configures it, whatever the base's own is
RELEASED_SAMPLING = Sampling(scheduler="PNDMScheduler", spacing="leading", skip_prk=True)
# of the demo: pairs that share the surroundings of one good part
SHARED = 10


@dataclass(frozen=True)
class Subject:
    """What pairs are drawn of.

    background: of the pairs from a seed on; None for adapters without one. shared: how many pairs
    have it in common; None for all.
    """

    prompts: Prompts
    background: Callable[[int], Background | None] = lambda start: None
    shared: int | None = None


@dataclass(frozen=True)
class Drawn:
    """Pairs in the order of their seeds. latents: clean, float32 [N, 2, 4, h, w]."""

    samples: list[Sample]
    latents: NDArray[np.float32]


def demo_subject(name: str) -> Subject:
    """Of a demo adapter: ten pairs each share the surroundings of one good part."""
    from dualdiff_engine.demo.presets import find

    preset = find(name)
    return Subject(preset.prompts, lambda start: preset.options(start).get("background"), SHARED)


def samplings(
    presets: Sequence[str], guidance: float | None, reference_steps: int, *, distilled: bool = False
) -> dict[str, Sampling]:
    """What is drawn, by name: the converged reference, the released sampler, the presets.

    reference_steps: of DPM-Solver++ with trailing timesteps, the solver of the presets. distilled:
    the adapter that the presets are drawn with holds the guidance.
    """
    solver = replace(PRESETS["fast"], steps=reference_steps)
    compared = {CONVERGED: solver, RELEASED: RELEASED_SAMPLING}
    found = {name: replace(sampling, guidance=guidance) for name, sampling in compared.items()}
    own = None if distilled else guidance
    return {**found, **{name: Sampling(preset=name, guidance=own) for name in presets}}


def described(engine: Engine, sampling: Sampling) -> tuple[ChosenSampling, int]:
    """A sampling with the active adapter's defaults in place, and its denoiser calls."""
    base = engine.base
    chosen = sampling.filled(
        background=engine.active.summary.background,
        scheduler=type(base.scheduler).__name__,
        size=base.picture_size,
        held_guidance=engine.active.summary.held_guidance,
    )
    scheduler = base.make_scheduler(chosen.scheduler, chosen.schedule)
    scheduler.set_timesteps(chosen.steps, device="cpu")
    return chosen, len(scheduler.timesteps)


def draw(
    engine: Engine,
    subject: Subject,
    sampling: Sampling,
    folder: Path,
    count: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
    progress: bool = False,
) -> Drawn | None:
    """The pairs of seeds 0 to count - 1; None when interrupted, to be continued.

    folder: holds a folder for each sampling. Raises OutputError, and DataError for a folder whose
    pairs and latents do not belong together.
    """
    folder = folder / _folder_name(engine, subject, sampling)
    latents, group = _Latents(), subject.shared or count
    with FolderWriter(folder, append=subject.shared is not None) as writer:
        for start in range(0, count, group):
            stream = engine.stream(
                range(start, min(start + group, count)),
                sampling=sampling,
                prompts=subject.prompts,
                background=subject.background(start),
                callback_on_step_end=latents,
                resume=writer,
                progress=progress,
            )
            with closing(stream) as pairs:
                for pair in pairs:
                    # before the pair: none in the manifest is without
                    write_whole(_latents_of(folder, pair.seed), latents.next())
                    writer.write(pair)
            if stopped():
                return None
    return _read(folder, count)


class _Latents:
    """A callback that keeps the latents of the running batch."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def __call__(
        self, engine: Engine, step: int, timestep: Tensor, values: Mapping[str, Tensor]
    ) -> None:
        self._rows = list(values["latents"])

    def next(self) -> bytes:
        """The file of the next pair: a batch's pairs come before the next batch is begun."""
        content = io.BytesIO()
        np.save(content, self._rows.pop(0).float().cpu().numpy())
        return content.getvalue()


def _latents_of(folder: Path, seed: int) -> Path:
    return folder / LATENTS / f"{seed:05d}.npy"


def _folder_name(engine: Engine, subject: Subject, sampling: Sampling) -> str:
    """Of what decides about the pairs; their number may grow."""
    chosen, calls = described(engine, sampling)
    values: list[Any] = [engine.base.sha256, engine.active.summary.sha256, str(engine.dtype)]
    values += [chosen.recorded(), asdict(subject.prompts)]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{chosen.scheduler.removesuffix('Scheduler')}-{calls}-{digest[:8]}"


def _read(folder: Path, count: int) -> Drawn:
    samples = find_pairs(folder, fewest=count)[:count]
    try:
        rows = [np.load(_latents_of(folder, seed)) for seed in range(count)]
        return Drawn(samples, np.stack(rows).astype(np.float32))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / LATENTS} is damaged ({error}): remove {folder}") from error
