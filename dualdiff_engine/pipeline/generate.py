"""From a checked request to pairs: text, background, noise, denoise, decode, mask.

`generate` is the whole road. It knows no engine: a `Run` holds the parts that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualdiff_engine.adapters import verdicts
from dualdiff_engine.device import enough_memory, is_out_of_memory, numerics, release_memory
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
from dualdiff_engine.pipeline import background as backgrounds
from dualdiff_engine.pipeline import faults
from dualdiff_engine.pipeline import placement as placing
from dualdiff_engine.pipeline.background import Bank, BankOfEach, BankStore, Surroundings
from dualdiff_engine.pipeline.batches import SMALLER, BatchMemory, BusyLock, Stderr
from dualdiff_engine.pipeline.blend import Level
from dualdiff_engine.pipeline.decode import decode
from dualdiff_engine.pipeline.denoise import Schedule, denoise, draw_latents
from dualdiff_engine.pipeline.encode import PictureLatents
from dualdiff_engine.pipeline.faults import FiniteWatch
from dualdiff_engine.pipeline.masks import MaskResult, Segmenter, extract_mask
from dualdiff_engine.pipeline.placement import Canvas, Canvases, Placed
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import (
    Background,
    ChosenSampling,
    Placement,
    Prompts,
    Sampling,
    batch_of,
    seeds_of,
)

T = TypeVar("T")


class Resumed(Protocol):
    """Where pairs go; knows which are there."""

    def missing(
        self, recipes: Sequence[Mapping[str, Any]], seeds: Sequence[int], free: bool
    ) -> list[tuple[int, int]]:
        """The pairs to draw, each as its number and its seed.

        recipes: one per seed, or one for all. free: the seeds were not asked for by number.
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
    needs a background. prompts: drawn when a caller names none. is_active: whether the adapter is
    still the one that the denoiser holds. interrupted: whether to stop after this step. busy: held
    while networks run. batches: which batches fitted into memory.
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
    prompts: Prompts
    facts: Facts
    is_active: Callable[[], bool]
    interrupted: Callable[[], bool]
    busy: BusyLock
    batches: BatchMemory


@dataclass(frozen=True)
class Request:
    """What a caller asked for, checked. No network has run.

    pairs: those to draw, each as its number among those asked for and its seed; placements,
    backgrounds and given latents have that number. tokens: ids of the prompts, as from
    `TextEncoder.tokenize_pair`. surroundings: none, one for all pairs, or one per pair asked for.
    latents [n, 2, 4, h, w], background_latents [2, 4, h, w] and background_noise
    [calls, 2, 4, h, w] replace the draws. recipes: one per pair asked for, or one for all.
    """

    pairs: tuple[tuple[int, int], ...]
    batch: int
    sampling: ChosenSampling
    schedule: Schedule
    latent_size: tuple[int, int]
    prompts: Prompts
    tokens: Tensor
    surroundings: tuple[Surroundings, ...]
    canvases: Canvases | None
    levels: list[Level]
    latents: Tensor | None
    background_latents: Tensor | None
    background_noise: Tensor | None
    segment: Callable[[Any], MaskResult]
    output_type: str
    callback: StepCallback | None
    on_fault: Callable[[Fault], None] | None
    progress: bool
    recipes: tuple[dict[str, Any], ...]

    def recipe(self, number: int) -> dict[str, Any]:
        return self.recipes[number if len(self.recipes) > 1 else 0]


@dataclass(frozen=True)
class Batch:
    """Pairs that are drawn at once; all of their own tensors are per pair.

    noise: [B, 2, 4, h, w]; generators: those of the pairs, which have drawn it. bank: of the
    background, if there is one. placed: of the placements, if there are any.
    """

    noise: Tensor
    generators: list[torch.Generator]
    bank: Bank | None
    placed: Placed | None

    def half(self) -> Batch:
        """The first half, as before it was drawn."""
        pairs = len(self.noise) // 2
        # a pair's generators have drawn: its seed starts again
        seeds = [generator.initial_seed() for generator in self.generators[:pairs]]
        again = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw_latents(again, *self.noise.shape[-2:])
        bank = self.bank.first(pairs) if isinstance(self.bank, BankOfEach) else self.bank
        placed = self.placed.first(pairs) if self.placed else None
        return Batch(self.noise[:pairs], again, bank, placed)


def check(
    run: Run,
    n: int | Sequence[int] | None,
    seeds: int | Sequence[int] | None,
    sampling: Sampling,
    *,
    batch: int | None,
    prompts: Prompts | tuple[str, str] | None,
    background: Background | Sequence[Background] | None,
    placement: Placement | Sequence[Placement] | None,
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
    placements = placing.listed(placement)
    with_background = background is not None or background_latents is not None
    # the normal picture is its own background
    own = bool(placements) and run.trained_background and not with_background
    with_background |= own
    _check_background(run, with_background, background_noise)
    chosen = sampling.filled(background=with_background, scheduler=run.scheduler, size=run.size)
    size = _latent_size(chosen, run.pixels_per_latent)
    schedule = Schedule(lambda: run.make_scheduler(chosen.scheduler, chosen.schedule), chosen.steps)
    latents = tensor_of("latents", latents, ("n", 2, 4, *size))
    background_latents = tensor_of("background_latents", background_latents, (2, 4, *size))
    noise_shape = (schedule.calls, 2, 4, *size)
    background_noise = tensor_of("background_noise", background_noise, noise_shape)
    pairs = _seeds(n, seeds, latents, placement)
    batch = batch_of(batch, run.max_batch, len(pairs))
    canvases = _canvases(run, placements, len(pairs), chosen, need_object=own)
    surroundings = _surroundings(
        canvases if own and canvases else backgrounds.listed(background, len(pairs)),
        chosen, background_latents, background_noise,
    )  # fmt: skip
    parsed = run.prompts if prompts is None else Prompts.of(prompts)
    given = {"latents": latents, "background_latents": background_latents}
    names = [name for name, tensor in given.items() if tensor is not None]
    recipe = _recipe(run.facts, chosen, parsed, names, segmenter, schedule.calls)
    recipes = _recipes(recipe, surroundings, canvases)
    if resume is not None and latents is not None:
        raise SettingsError("given latents cannot be continued: leave out latents or resume")
    free = seeds is None and not isinstance(n, Sequence)
    drawn = enumerate(pairs) if resume is None else resume.missing(recipes, pairs, free)
    return Request(
        pairs=tuple(drawn),
        batch=batch,
        sampling=chosen,
        schedule=schedule,
        latent_size=size,
        prompts=parsed,
        tokens=run.text_encoder.tokenize_pair(parsed),
        surroundings=surroundings,
        canvases=canvases,
        levels=schedule.noise_levels() if canvases else [],
        latents=latents,
        background_latents=background_latents,
        background_noise=background_noise,
        segment=Segmenter(segmenter) if segmenter else extract_mask,
        output_type=check_output_type(output_type),
        callback=callback,
        on_fault=on_fault,
        progress=progress,
        recipes=recipes,
    )


def _seeds(n: Any, seeds: Any, latents: Tensor | None, placement: Any) -> tuple[int, ...]:
    """As `seeds_of`; without any, as many as there are placements."""
    if n is None and seeds is None and latents is None and isinstance(placement, list | tuple):
        n = len(placement)
    return seeds_of(n, seeds, None if latents is None else len(latents))


def _canvases(
    run: Run,
    placements: Sequence[Placement] | None,
    pairs: int,
    sampling: ChosenSampling,
    *,
    need_object: bool,
) -> Canvases | None:
    if placements is None:
        return None
    if len(placements) not in (1, pairs):
        raise SettingsError(
            f"placement lists {len(placements)} for {pairs} pairs: give one per pair, or one for "
            "all"
        )
    size = sampling.height, sampling.width
    return Canvases(placements, size, run.pixels_per_latent, need_object=need_object)


def _surroundings(
    source: Sequence[Background] | Canvases,
    sampling: ChosenSampling,
    latents: Tensor | None,
    noise: Tensor | None,
) -> tuple[Surroundings, ...]:
    """The backgrounds of a run, opened and checked; source: or the canvases that they are."""
    if isinstance(source, Canvases):
        return source.backgrounds(noise)
    if latents is None:
        size = sampling.height, sampling.width
        return tuple(Surroundings.of(each, size, noise) for each in source)
    if len(source) > 1:
        raise SettingsError("background_latents replace one background: pass one background")
    record = backgrounds.record_of(source[0] if source else Background(None), None, noise)
    return (Surroundings(record, None),)


def _recipe(facts: Facts, sampling: ChosenSampling, *rest: Any) -> dict[str, Any]:
    """As `describe`, with what is known of the preset."""
    preset = verdicts.of_run(facts.base, facts.adapter, sampling)
    return describe(facts, sampling, *rest, preset=preset)


def _recipes(
    shared: dict[str, Any], surroundings: Sequence[Surroundings], canvases: Canvases | None
) -> tuple[dict[str, Any], ...]:
    """One for all pairs, or one for each where they have pictures of their own."""
    around: list[dict[str, Any] | None] = [each.record for each in surroundings] or [None]
    placed: list[dict[str, Any] | None] = [*canvases.records] if canvases else [None]
    count = max(len(around), len(placed))
    around, placed = (x * count if len(x) == 1 else x for x in (around, placed))
    return tuple(
        {**shared, "background": a, "placement": p} for a, p in zip(around, placed, strict=True)
    )


@torch.inference_mode()
def generate(run: Run, request: Request) -> Generator[Pair, None, None]:
    """Yield a pair per seed, in order, until done or interrupted.

    A batch that does not fit into memory is halved and drawn again, to the same pairs. A pair that
    came out unusable goes to `on_fault`; without one it is raised when its turn comes.

    Raises:
        PairError: A pair cannot be used.
        OutOfMemoryError: Not even one pair fits, to be drawn or to be decoded.
        SettingsError: The adapter was switched, or the engine is in use by another caller.
    """
    if not request.pairs or run.interrupted():
        return
    encoded = PictureLatents(run.vae)
    with _networks(run):
        text = _with_room(run, "while the prompts are encoded", lambda: _text(run, request))
    start, total = 0, request.schedule.calls * len(request.pairs)
    with tqdm(total=total, disable=not request.progress, unit="call", file=Stderr()) as bar:
        while start < len(request.pairs):
            _check_active(run)
            with _networks(run):
                count = run.batches.next(min(request.batch, len(request.pairs) - start))
                batch = _with_room(
                    run,
                    "while the background is encoded",
                    partial(_batch, run, request, encoded, start, count),
                )
                drawn = _denoise(run, request, text, batch, bar)
            if drawn is None:
                return
            canvases = batch.placed.canvases if batch.placed else (None,) * count
            # a batch that did not fit is shorter
            for offset, (latents, bad_step) in enumerate(zip(*drawn, strict=True)):
                place, canvas = start + offset, canvases[offset]
                yield from _finished(run, request, place, latents, bad_step, canvas)
            start += len(drawn[0])


def _finished(
    run: Run,
    request: Request,
    place: int,
    latents: Tensor,
    bad_step: int,
    canvas: Canvas | None,
) -> Iterator[Pair]:
    """The decoded pair with its mask; nothing, after `on_fault`, when it cannot be used.

    place: of the pair among those to draw.
    """
    number, seed = request.pairs[place]
    recipe = request.recipe(number)
    fault = faults.of_latents(bad_step, run.dtype)
    if fault is None:
        with _networks(run):
            image, anomaly = _with_room(
                run, "while a pair is decoded", lambda: decode(run.vae, latents)
            )
        fault = faults.of_pictures(image, anomaly)
    if fault is None:
        if canvas is not None:
            image, anomaly = canvas.paste(image, anomaly)
        mask = request.segment(to_uint8(anomaly))
        yield _pair(request, recipe, seed, image, anomaly, mask, canvas)
    elif request.on_fault is None:
        raise PairError(seed, fault)
    else:
        request.on_fault(Fault(seed, fault, {**recipe, "seed": seed}))


def _with_room(run: Run, doing: str, call: Callable[[], T]) -> T:
    """Make a call that has no batch to halve; returns its result.

    When memory runs out, what earlier calls left behind is freed: kept shares, and the blocks of
    larger batches. Then the call is made once more. Raises OutOfMemoryError.
    """
    try:
        return call()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler, so that the failed call's tensors are gone
    run.batches.freed(doing)
    run.banks.release()
    release_memory(run.device)
    with enough_memory(doing, SMALLER):
        return call()


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


def _bank(
    run: Run, request: Request, encoded: PictureLatents, numbers: Sequence[int]
) -> Bank | None:
    """What the image branch reads of the backgrounds of these pairs, call by call."""
    if not request.surroundings:
        return None

    def opened(surroundings: Surroundings) -> backgrounds.BackgroundBank:
        return run.banks.open(
            surroundings.record,
            surroundings.pixels,
            request.background_latents,
            request.background_noise,
            shape=(request.sampling.rows, 4, *request.latent_size),
            prompts=request.prompts,
            encoded=encoded,
            make_noiser=run.make_noiser,
            device=run.device,
        )

    if len(request.surroundings) == 1:
        return opened(request.surroundings[0])
    own = [request.surroundings[number] for number in numbers]
    # equal backgrounds are one
    banks = {tuple(each.record.values()): each for each in own}
    open_banks = {key: opened(each) for key, each in banks.items()}
    return BankOfEach([open_banks[tuple(each.record.values())] for each in own])


def _batch(run: Run, request: Request, encoded: PictureLatents, start: int, count: int) -> Batch:
    """The pairs from a place on, among those to draw."""
    pairs = request.pairs[start : start + count]
    numbers = [number for number, _ in pairs]
    generators = [torch.Generator().manual_seed(seed) for _, seed in pairs]
    # drawn in any case: the generators go on to the scheduler's own noise
    noise = draw_latents(generators, *request.latent_size)
    if request.latents is not None:
        noise = request.latents[numbers]
    placed = None
    if request.canvases is not None:
        canvases = [request.canvases.canvas(number, seed) for number, seed in pairs]
        placed = Placed.of(canvases, encoded, run.vae.config.scaling_factor, run.device)
    bank = _bank(run, request, encoded, numbers)
    return Batch(noise.to(run.device), generators, bank, placed)


def _denoise(
    run: Run, request: Request, text: Sequence[Tensor], batch: Batch, bar: tqdm[Any]
) -> tuple[Tensor, list[int]] | None:
    """Clean latents [B, 2, 4, h, w] and the first bad step of each pair; None when interrupted.

    A batch that does not fit gives those of its first half.
    """
    watch, before, pairs = FiniteWatch(), bar.n, len(batch.noise)

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        bar.update(pairs)
        if request.callback is not None:
            latents = _changed(request.callback(step, timestep, {"latents": latents}), latents)
        watch.look(step, latents)
        return None if run.interrupted() else latents

    try:
        clean = denoise(
            run.denoiser,
            run.ops,
            request.schedule.fresh(),
            batch.noise,
            text,
            request.sampling,
            batch.generators,
            batch.bank,
            step_end,
            batch.placed.blend(batch.noise, request.levels) if batch.placed else None,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        message = str(error)
    else:
        run.batches.fitted()
        return None if clean is None else (clean, watch.first_bad())
    # outside the handler, so that the failed batch's tensors are gone
    bar.update(before - bar.n)
    run.batches.failed(pairs, message)
    return _denoise(run, request, text, batch.half(), bar)


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


def _pair(
    request: Request,
    recipe: Mapping[str, Any],
    seed: int,
    image: Tensor,
    anomaly: Tensor,
    result: MaskResult,
    canvas: Canvas | None,
) -> Pair:
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
        recipe={**recipe, "seed": seed, "mask": mask},
        region=None if canvas is None else present_mask(canvas.mask, request.output_type),
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
