"""What a caller asked for, checked once, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dualdiff_engine.adapters import verdicts
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.model.coupling import MASK, Coupling
from dualdiff_engine.ops import Ops
from dualdiff_engine.pair import (
    Facts,
    Fault,
    check_output_type,
    describe,
)
from dualdiff_engine.pipeline import background as backgrounds
from dualdiff_engine.pipeline import placement as placing
from dualdiff_engine.pipeline.background import BankStore, Surroundings
from dualdiff_engine.pipeline.batches import BatchMemory, BusyLock
from dualdiff_engine.pipeline.blend import Level
from dualdiff_engine.pipeline.denoise import Schedule
from dualdiff_engine.pipeline.masks import MaskResult, Segmenter, drawn_mask, extract_mask
from dualdiff_engine.pipeline.placement import Canvases
from dualdiff_engine.pipeline.scores import Acceptance, MaskSource, check_mask_source
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
    needs a background. coupling: of its branches; None: DualAnoDiff's. window: the ratio of the
    windows that it was trained on. held_guidance: what a distilled adapter holds. prompts: drawn
    when a caller names none. is_active: whether the adapter is still the one that the denoiser
    holds. interrupted: whether to stop after this step. busy: held while networks run. batches:
    which batches fitted into memory.
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
    coupling: Coupling | None
    window: float | None
    held_guidance: float | None
    prompts: Prompts
    facts: Facts
    is_active: Callable[[], bool]
    interrupted: Callable[[], bool]
    busy: BusyLock
    batches: BatchMemory

    def filled(self, sampling: Sampling, *, background: bool) -> ChosenSampling:
        """With the defaults of base model and adapter. Raises SettingsError."""
        return sampling.filled(
            background=background,
            scheduler=self.scheduler,
            size=self.size,
            held_guidance=self.held_guidance,
        )


@dataclass(frozen=True)
class Given:
    """Tensors that replace draws, fp32 on the CPU.

    latents [n, 2, 4, h, w], background_latents [2, 4, h, w], background_noise
    [calls, 2, 4, h, w].
    """

    latents: Tensor | None
    background_latents: Tensor | None
    background_noise: Tensor | None

    @classmethod
    def of(
        cls,
        latents: Tensor | None,
        background_latents: Tensor | None,
        background_noise: Tensor | None,
        calls: int,
        size: tuple[int, int],
    ) -> Given:
        """Checked; calls: of the denoiser. size: (h, w). Raises SettingsError."""
        return cls(
            tensor_of("latents", latents, ("n", 2, 4, *size)),
            tensor_of("background_latents", background_latents, (2, 4, *size)),
            tensor_of("background_noise", background_noise, (calls, 2, 4, *size)),
        )

    @property
    def names(self) -> list[str]:
        """As a recipe lists them: the noise is part of its background."""
        tensors = {"latents": self.latents, "background_latents": self.background_latents}
        return [name for name, tensor in tensors.items() if tensor is not None]


@dataclass(frozen=True)
class Request:
    """What a caller asked for, checked. No network has run.

    pairs: those to draw, each as its number among those asked for and its seed; placements,
    backgrounds and given latents have that number. tokens: ids of the prompts, as from
    `TextEncoder.tokenize_pair`. surroundings: none, one for all pairs, or one per pair asked for.
    recipes: one per pair asked for, or one for all.
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
    given: Given
    segment: Callable[[Any], MaskResult]
    mask: MaskSource
    acceptance: Acceptance | None
    output_type: str
    callback: StepCallback | None
    on_fault: Callable[[Fault], None] | None
    progress: bool
    recipes: tuple[dict[str, Any], ...]

    def recipe(self, number: int) -> dict[str, Any]:
        return self.recipes[number if len(self.recipes) > 1 else 0]

    def around(self, number: int, seed: int) -> Surroundings:
        """The background of a pair."""
        shared = self.surroundings[number if len(self.surroundings) > 1 else 0]
        if shared.pixels is not None or self.given.background_latents is not None:
            return shared
        assert self.canvases is not None, "only windows make a background for each seed"
        return self.canvases.surroundings(number, seed, self.given.background_noise)


def _mask_of(run: Run) -> Callable[[Any], MaskResult]:
    """What finds the mask in the second branch's picture."""
    drawn = run.coupling is not None and run.coupling.annotation == MASK
    return drawn_mask if drawn else extract_mask


def check(
    run: Run,
    n: int | Sequence[int] | None,
    seeds: int | Sequence[int] | None,
    sampling: Sampling,
    *,
    batch: int | None = None,
    prompts: Prompts | tuple[str, str] | None = None,
    background: Background | Sequence[Background] | None = None,
    placement: Placement | Sequence[Placement] | None = None,
    latents: Tensor | None = None,
    background_latents: Tensor | None = None,
    background_noise: Tensor | None = None,
    segmenter: str | Path | None = None,
    mask: str = "anomaly",
    accept: str | Mapping[str, float] | None = None,
    attempts: int | None = None,
    output_type: str = "pil",
    callback: StepCallback | None = None,
    on_fault: Callable[[Fault], None] | None = None,
    resume: Resumed | None = None,
    progress: bool = False,
) -> Request:
    """Check everything once, before anything is computed. Raises SettingsError, SegmenterError."""
    placements = placing.listed(placement)
    with_background = background is not None or background_latents is not None
    # the normal picture is its own background
    own = bool(placements) and run.trained_background and not with_background
    with_background |= own
    _check_background(run, with_background, background_noise)
    chosen = run.filled(sampling, background=with_background)
    size = _latent_size(chosen, run.pixels_per_latent)
    schedule = Schedule(lambda: run.make_scheduler(chosen.scheduler, chosen.schedule), chosen.steps)
    given = Given.of(latents, background_latents, background_noise, schedule.calls, size)
    pairs = _seeds(n, seeds, given.latents, placement)
    batch = batch_of(batch, run.max_batch, len(pairs))
    canvases = _canvases(run, placements, len(pairs), chosen, need_object=own)
    around = canvases if own and canvases else backgrounds.listed(background, len(pairs))
    surroundings = _surroundings(around, chosen, given)
    parsed = run.prompts if prompts is None else Prompts.of(prompts)
    placed = canvases is not None
    source = check_mask_source(mask, placed=placed)
    acceptance = Acceptance.of(accept, attempts, placed=placed)
    shared = describe(
        run.facts, chosen, parsed, given.names, segmenter, schedule.calls,
        preset=verdicts.of_run(run.facts.base, run.facts.adapter, chosen, placed=placed),
        mask_source=source, accept=acceptance.record() if acceptance else None,
    )  # fmt: skip
    recipes = _recipes(shared, surroundings, canvases)
    if given.latents is not None and (resume or acceptance):
        raise SettingsError("given latents cannot be continued or drawn again: leave out latents")
    free = seeds is None and not isinstance(n, Sequence)
    return Request(
        pairs=tuple(resume.missing(recipes, pairs, free) if resume else enumerate(pairs)),
        batch=batch,
        sampling=chosen,
        schedule=schedule,
        latent_size=size,
        prompts=parsed,
        tokens=run.text_encoder.tokenize_pair(parsed),
        surroundings=surroundings,
        canvases=canvases,
        levels=schedule.noise_levels() if canvases else [],
        given=given,
        segment=Segmenter(segmenter) if segmenter else _mask_of(run),
        mask=source,
        acceptance=acceptance,
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
    return Canvases(
        placements, size, run.pixels_per_latent, need_object=need_object, auto=run.window
    )


def _surroundings(
    source: Sequence[Background] | Canvases, sampling: ChosenSampling, given: Given
) -> tuple[Surroundings, ...]:
    """The backgrounds of a run, opened and checked; source: or the canvases that they are."""
    noise = given.background_noise
    if isinstance(source, Canvases):
        return source.backgrounds(noise)
    if given.background_latents is None:
        size = sampling.height, sampling.width
        return tuple(Surroundings.of(each, size, noise) for each in source)
    if len(source) > 1:
        raise SettingsError("background_latents replace one background: pass one background")
    record = backgrounds.record_of(source[0] if source else Background(None), None, noise)
    return (Surroundings(record, None),)


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
