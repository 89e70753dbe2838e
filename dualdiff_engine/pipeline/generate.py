"""From a checked request to pairs: text, background, noise, denoise, decode, mask.

`generate` is the whole road. It knows no engine: a `Run` holds the parts that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualdiff_engine.adapters import verdicts
from dualdiff_engine.device import is_out_of_memory, numerics
from dualdiff_engine.errors import PairError, SettingsError
from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.ops import Ops
from dualdiff_engine.pair import (
    Facts,
    Fault,
    Pair,
    check_output_type,
    describe,
    present,
    present_mask,
    to_uint8,
)
from dualdiff_engine.pipeline import faults
from dualdiff_engine.pipeline.background import BackgroundBank, BankStore, cut_out, record_of
from dualdiff_engine.pipeline.batches import BatchMemory, BusyLock, Stderr
from dualdiff_engine.pipeline.decode import decode
from dualdiff_engine.pipeline.denoise import Schedule, denoise, draw_latents
from dualdiff_engine.pipeline.faults import FiniteWatch
from dualdiff_engine.pipeline.masks import MaskResult, Segmenter, extract_mask
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import (
    Background,
    ChosenSampling,
    Prompts,
    Sampling,
    batch_of,
    seeds_of,
)


class Resumed(Protocol):
    """Where pairs go; knows which are there."""

    def missing(self, recipe: Mapping[str, Any], seeds: Sequence[int], free: bool) -> list[int]:
        """The seeds to draw; free: they were not asked for by number.

        Raises OutputError when what is there was drawn by another recipe.
        """
        ...


# diffusers' convention: (step, timestep, {"latents": [B, 2, 4, h, w]}) -> the same dict
StepCallback = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Run:
    """The parts that draw pairs with one adapter.

    text_weights: the text encoder's weights that the adapter changes. make_scheduler: by class name
    and options. make_noiser: a scheduler whose `add_noise` noises backgrounds. size: (height,
    width) in pixels and scheduler: the base model's own. trained_background: whether the adapter
    needs a background. is_active: whether the adapter is still the one that the denoiser holds.
    interrupted: whether to stop after this step. busy: held while networks run. batches: which
    batches fitted into memory.
    """

    denoiser: Denoiser
    ops: Ops
    text_encoder: TextEncoder
    text_weights: Mapping[str, Tensor]
    vae: Any
    make_scheduler: Callable[[str, Mapping[str, Any]], Any]
    make_noiser: Callable[[], Any]
    banks: BankStore
    device: torch.device
    dtype: torch.dtype
    max_batch: int
    size: tuple[int, int]
    pixels_per_latent: int
    scheduler: str
    adapter: str | None
    trained_background: bool
    facts: Facts
    is_active: Callable[[], bool]
    interrupted: Callable[[], bool]
    busy: BusyLock
    batches: BatchMemory


@dataclass(frozen=True)
class Request:
    """What a caller asked for, checked. No network has run.

    tokens: ids of the prompts, as from `TextEncoder.tokenize_pair`. surroundings: pixels of the
    background, uint8 [H, W, 3]. latents [n, 2, 4, h, w], background_latents [2, 4, h, w] and
    background_noise [calls, 2, 4, h, w] replace the draws.
    """

    seeds: tuple[int, ...]
    batch: int
    sampling: ChosenSampling
    schedule: Schedule
    latent_size: tuple[int, int]
    prompts: Prompts
    tokens: Tensor
    surroundings: np.ndarray | None
    latents: Tensor | None
    background_latents: Tensor | None
    background_noise: Tensor | None
    segment: Callable[[Any], MaskResult]
    output_type: str
    callback: StepCallback | None
    on_fault: Callable[[Fault], None] | None
    progress: bool
    recipe: dict[str, Any]


def check(
    run: Run,
    n: int | Sequence[int] | None,
    seeds: int | Sequence[int] | None,
    sampling: Sampling,
    *,
    batch: int | None,
    prompts: Prompts | tuple[str, str] | None,
    background: Background | None,
    latents: Tensor | None,
    background_latents: Tensor | None,
    background_noise: Tensor | None,
    segmenter: str | Path | None,
    output_type: str,
    callback: StepCallback | None,
    on_fault: Callable[[Fault], None] | None,
    resume: Resumed | None,
    progress: bool,
) -> Request:
    """Check everything once, before anything is computed. Raises SettingsError, SegmenterError."""
    with_background = background is not None or background_latents is not None
    _check_background(run, with_background, background_noise)
    chosen = sampling.filled(background=with_background, scheduler=run.scheduler, size=run.size)
    size = _latent_size(chosen, run.pixels_per_latent)
    schedule = Schedule(lambda: run.make_scheduler(chosen.scheduler, chosen.schedule), chosen.steps)
    latents = tensor_of("latents", latents, ("n", 2, 4, *size))
    background_latents = tensor_of("background_latents", background_latents, (2, 4, *size))
    noise_shape = (schedule.calls, 2, 4, *size)
    background_noise = tensor_of("background_noise", background_noise, noise_shape)
    pairs = seeds_of(n, seeds, None if latents is None else len(latents))
    batch = batch_of(batch, run.max_batch, len(pairs))
    surroundings, record = None, None
    if with_background:
        surroundings, record = _surroundings(
            background, chosen, background_latents, background_noise
        )
    parsed = Prompts.of(prompts)
    given = {"latents": latents, "background_latents": background_latents}
    recipe = describe(
        run.facts,
        chosen,
        parsed,
        record,
        [name for name, tensor in given.items() if tensor is not None],
        str(segmenter) if segmenter else None,
        schedule.calls,
        verdicts.of_run(run.facts.base, run.facts.adapter, chosen),
    )
    if resume is not None:
        if latents is not None:
            raise SettingsError("given latents cannot be continued: leave out latents or resume")
        free = seeds is None and not isinstance(n, Sequence)
        pairs = tuple(resume.missing(recipe, pairs, free))
    return Request(
        seeds=pairs,
        batch=batch,
        sampling=chosen,
        schedule=schedule,
        latent_size=size,
        prompts=parsed,
        tokens=run.text_encoder.tokenize_pair(parsed),
        surroundings=surroundings,
        latents=latents,
        background_latents=background_latents,
        background_noise=background_noise,
        segment=Segmenter(segmenter) if segmenter else extract_mask,
        output_type=check_output_type(output_type),
        callback=callback,
        on_fault=on_fault,
        progress=progress,
        recipe=recipe,
    )


@torch.inference_mode()
def generate(run: Run, request: Request) -> Generator[Pair, None, None]:
    """Yield a pair per seed, in order, until done or interrupted.

    A batch that does not fit into memory is halved and drawn again, to the same pairs. A pair that
    came out unusable goes to `on_fault`; without one it is raised when its turn comes.

    Raises:
        PairError: A pair cannot be used.
        OutOfMemoryError: Not even one pair fits.
        SettingsError: The adapter was switched, or the engine is in use by another caller.
    """
    if not request.seeds or run.interrupted():
        return
    with _networks(run):
        text = _text(run, request)
        bank = _background(run, request)
    start, total = 0, request.schedule.calls * len(request.seeds)
    with tqdm(total=total, disable=not request.progress, unit="call", file=Stderr()) as bar:
        while start < len(request.seeds):
            _check_active(run)
            with _networks(run):
                batch = run.batches.next(min(request.batch, len(request.seeds) - start))
                noise, generators = _noise(request, start, batch)
                drawn = _denoise(run, request, text, bank, noise, generators, bar)
            if drawn is None:
                return
            for seed, latents, bad_step in zip(request.seeds[start:], *drawn, strict=False):
                yield from _finished(run, request, seed, latents, bad_step)
            start += len(drawn[0])


def _finished(
    run: Run, request: Request, seed: int, latents: Tensor, bad_step: int
) -> Iterator[Pair]:
    """The decoded pair with its mask; nothing, after `on_fault`, when it cannot be used."""
    fault = faults.of_latents(bad_step, run.dtype)
    if fault is None:
        with _networks(run):
            image, anomaly = decode(run.vae, latents)
        fault = faults.of_pictures(image, anomaly)
    if fault is None:
        mask = request.segment(to_uint8(anomaly))
        yield _pair(request, seed, image, anomaly, mask)
    elif request.on_fault is None:
        raise PairError(seed, fault)
    else:
        request.on_fault(Fault(seed, fault, {**request.recipe, "seed": seed}))


@contextmanager
def _networks(run: Run) -> Iterator[None]:
    """Held while networks run, under the run's numerics."""
    with run.busy.held(), numerics(run.device, run.facts.tf32):
        yield


def _text(run: Run, request: Request) -> list[Tensor]:
    """What the denoiser's calls need of the prompts."""
    context = run.text_encoder.encode_pair(request.tokens, run.text_weights)
    context = context[:, -request.sampling.rows :]
    return run.denoiser.text_inputs(context.to(run.device, run.dtype))


def _surroundings(
    background: Background | None,
    sampling: ChosenSampling,
    latents: Tensor | None,
    noise: Tensor | None,
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Pixels of the background, if it is encoded, and its part of the recipe."""
    pixels = None
    if background is not None and latents is None:
        pixels = cut_out(background, sampling.height, sampling.width)
    return pixels, record_of(background or Background(None), pixels, noise)


def _background(run: Run, request: Request) -> BackgroundBank | None:
    """What the image branch reads of the background, call by call."""
    record = request.recipe["background"]
    if record is None:
        return None
    return run.banks.open(
        record,
        request.surroundings,
        request.background_latents,
        request.background_noise,
        shape=(request.sampling.rows, 4, *request.latent_size),
        prompts=request.prompts,
        vae=run.vae,
        make_noiser=run.make_noiser,
        device=run.device,
    )


def _noise(request: Request, start: int, batch: int) -> tuple[Tensor, list[torch.Generator]]:
    """Latents [B, 2, 4, h, w] of a batch from a pair on, and its pairs' generators."""
    seeds = request.seeds[start : start + batch]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # drawn in any case: the generators go on to the scheduler's own noise
    latents = draw_latents(generators, *request.latent_size)
    if request.latents is not None:
        latents = request.latents[start : start + len(seeds)]
    return latents, generators


def _denoise(
    run: Run,
    request: Request,
    text: Sequence[Tensor],
    bank: BackgroundBank | None,
    noise: Tensor,
    generators: Sequence[torch.Generator],
    bar: tqdm[Any],
) -> tuple[Tensor, list[int]] | None:
    """Clean latents [B, 2, 4, h, w] and the first bad step of each pair; None when interrupted.

    A batch that does not fit gives those of its first half.
    """
    watch, before = FiniteWatch(), bar.n

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        bar.update(len(noise))
        if request.callback is not None:
            latents = _changed(request.callback(step, timestep, {"latents": latents}), latents)
        watch.look(step, latents)
        return None if run.interrupted() else latents

    try:
        clean = denoise(
            run.denoiser,
            run.ops,
            request.schedule.fresh(),
            noise.to(run.device),
            text,
            request.sampling,
            generators,
            bank,
            step_end,
        )
    except (RuntimeError, MemoryError, OSError, ValueError) as error:
        if not is_out_of_memory(error):
            raise
    else:
        run.batches.fitted()
        return None if clean is None else (clean, watch.first_bad())
    # outside the handler, so that the failed batch's tensors are gone
    bar.update(before - bar.n)
    half = run.batches.failed(len(noise))
    # a pair's generators have drawn: its seed starts again
    seeds = [generator.initial_seed() for generator in generators[:half]]
    again = [torch.Generator().manual_seed(seed) for seed in seeds]
    draw_latents(again, *request.latent_size)
    return _denoise(run, request, text, bank, noise[:half], again, bar)


def _changed(returned: Any, latents: Tensor) -> Tensor:
    """What a callback hands back in place of the latents. Raises SettingsError."""
    if returned is None or "latents" not in returned:
        return latents
    changed = returned["latents"]
    if not isinstance(changed, Tensor) or changed.shape != latents.shape:
        got = list(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
        raise SettingsError(
            f"callback_on_step_end returned latents {got}: return a tensor {list(latents.shape)}, "
            "or no latents to leave them as they are"
        )
    return changed.to(latents)


def _pair(request: Request, seed: int, image: Tensor, anomaly: Tensor, result: MaskResult) -> Pair:
    mask = {
        "threshold": float(result.threshold),
        "area": float(result.area),
        "empty": bool(result.empty),
    }
    return Pair(
        image=present(image, request.output_type),
        anomaly=present(anomaly, request.output_type),
        mask=present_mask(result.mask, request.output_type),
        seed=seed,
        empty_mask=bool(result.empty),
        full_mask=bool(np.all(result.mask > 0)),
        recipe={**request.recipe, "seed": seed, "mask": mask},
    )


def _check_active(run: Run) -> None:
    if not run.is_active():
        raise SettingsError(
            f"the stream draws with {run.adapter!r}, which is no longer active: finish or "
            "close a stream before switching adapters"
        )


def _latent_size(sampling: ChosenSampling, step: int) -> tuple[int, int]:
    """(height, width) of the latents; step: pixels per latent."""
    if sampling.height % step or sampling.width % step:
        raise SettingsError(f"height and width must be multiples of {step} for this VAE")
    return sampling.height // step, sampling.width // step


def tensor_of(name: str, value: Tensor | None, shape: tuple[int | str, ...]) -> Tensor | None:
    """An override, if there is one, as fp32 on the CPU; letters in `shape` stand for any size."""
    if value is None:
        return None
    fits = (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == len(shape)
        and all(
            isinstance(want, str) or want == have
            for want, have in zip(shape, value.shape, strict=True)
        )
    )
    if not fits:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise SettingsError(f"{name} must be a floating-point tensor {list(shape)}, got {got}")
    own = value.detach().float().cpu()
    if not bool(torch.isfinite(own).all()):
        raise SettingsError(f"{name} holds NaN or infinity: pass finite numbers")
    return own


def _check_background(run: Run, given: bool, noise: Tensor | None) -> None:
    """A background exactly where the adapter was trained with one. Raises SettingsError."""
    if given and not run.trained_background:
        raise SettingsError(f"adapter {run.adapter!r} was trained without background: leave it out")
    if run.trained_background and not given:
        raise SettingsError(
            f"adapter {run.adapter!r} was trained with background: pass background=Background(…)"
        )
    if noise is not None and not given:
        raise SettingsError("background_noise needs a background")
