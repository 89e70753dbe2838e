"""From a checked request to pairs: text, background, noise, denoise, decode, mask.

`generate` is the whole road. It knows no engine: a `Run` holds the parts that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualdiff_engine.device import is_out_of_memory
from dualdiff_engine.errors import OutOfMemoryError, SettingsError
from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.ops import Ops
from dualdiff_engine.pair import (
    Facts,
    Pair,
    check_output_type,
    describe,
    present,
    present_mask,
    to_uint8,
)
from dualdiff_engine.pipeline.background import BackgroundBank, BankStore, cut_out
from dualdiff_engine.pipeline.decode import decode
from dualdiff_engine.pipeline.denoise import Schedule, denoise, draw_latents
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

# diffusers' convention: (step, timestep, {"latents": [B, 2, 4, h, w]}) -> the same dict
StepCallback = Callable[[int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


@dataclass(frozen=True)
class Run:
    """The parts that draw pairs with one adapter.

    text_weights: the text encoder's weights that the adapter changes. make_scheduler: by class
    name. make_noiser: a scheduler whose `add_noise` noises backgrounds. size: (height, width)
    in pixels and scheduler: the base model's own. trained_background: whether the adapter needs a
    background. is_active: whether the adapter is still the one that the denoiser holds.
    interrupted: whether to stop after this step.
    """

    denoiser: Denoiser
    ops: Ops
    text_encoder: TextEncoder
    text_weights: Mapping[str, Tensor]
    vae: Any
    make_scheduler: Callable[[str], Any]
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
    background: Background | None
    surroundings: np.ndarray | None
    latents: Tensor | None
    background_latents: Tensor | None
    background_noise: Tensor | None
    segment: Callable[[Any], MaskResult]
    segmenter: str | None
    output_type: str
    callback: StepCallback | None
    progress: bool

    @property
    def given(self) -> list[str]:
        """The tensors that replace a draw; given noise is told with the background."""
        return [x for x in ("latents", "background_latents") if getattr(self, x) is not None]


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
    progress: bool,
) -> Request:
    """Check everything once, before anything is computed. Raises SettingsError, SegmenterError."""
    with_background = background is not None or background_latents is not None
    _check_background(run, with_background, background_noise)
    chosen = sampling.filled(background=with_background, scheduler=run.scheduler, size=run.size)
    size = _latent_size(chosen, run.pixels_per_latent)
    schedule = Schedule(lambda: run.make_scheduler(chosen.scheduler), chosen.steps, run.device)
    if latents is not None:
        latents = tensor_of("latents", latents, ("n", 2, 4, *size))
    if background_latents is not None:
        background_latents = tensor_of("background_latents", background_latents, (2, 4, *size))
    if background_noise is not None:
        shape = (schedule.calls, 2, 4, *size)
        background_noise = tensor_of("background_noise", background_noise, shape)
    pairs = seeds_of(n, seeds, None if latents is None else len(latents))
    surroundings = None
    if background is not None and background_latents is None:
        surroundings = cut_out(background, chosen.height, chosen.width)
    spoken = Prompts.of(prompts)
    return Request(
        seeds=pairs,
        batch=batch_of(batch, run.max_batch, len(pairs)),
        sampling=chosen,
        schedule=schedule,
        latent_size=size,
        prompts=spoken,
        tokens=run.text_encoder.tokenize_pair(spoken),
        background=background,
        surroundings=surroundings,
        latents=latents,
        background_latents=background_latents,
        background_noise=background_noise,
        segment=Segmenter(segmenter) if segmenter else extract_mask,
        segmenter=str(segmenter) if segmenter else None,
        output_type=check_output_type(output_type),
        callback=callback,
        progress=progress,
    )


@torch.inference_mode()
def generate(run: Run, request: Request) -> Generator[Pair, None, None]:
    """Yield a pair per seed, in order, until done or interrupted.

    Raises:
        OutOfMemoryError: A batch does not fit; the message names one that does.
        SettingsError: The adapter was switched between two batches.
    """
    text = _text(run, request)
    bank, background = _background(run, request)
    recipe = describe(
        run.facts, request.sampling, request.prompts, background, request.given, request.segmenter
    )
    starts = range(0, len(request.seeds), request.batch)
    calls = request.schedule.calls * len(starts)
    with tqdm(total=calls, disable=not request.progress, unit="call") as bar:
        for start in starts:
            _check_active(run)
            noise, generators = _noise(request, start)
            clean = _denoise(run, request, text, bank, noise, generators, bar)
            if clean is None:
                return
            for seed, latents in zip(request.seeds[start:], clean, strict=False):
                image, anomaly = decode(run.vae, latents)
                mask = request.segment(to_uint8(anomaly))
                yield _pair(request, recipe, seed, image, anomaly, mask)


def _text(run: Run, request: Request) -> list[Tensor]:
    """What the denoiser's calls need of the prompts."""
    context = run.text_encoder.encode_pair(request.tokens, run.text_weights)
    context = context[:, -request.sampling.rows :]
    return run.denoiser.text_inputs(context.to(run.device, run.dtype))


def _background(run: Run, request: Request) -> tuple[BackgroundBank | None, dict[str, Any] | None]:
    """The background's bank and its part of the recipe."""
    if request.surroundings is None and request.background_latents is None:
        return None, None
    return run.banks.open(
        request.background or Background(None),
        request.surroundings,
        request.background_latents,
        request.background_noise,
        shape=(request.sampling.rows, 4, *request.latent_size),
        prompts=request.prompts,
        vae=run.vae,
        make_noiser=run.make_noiser,
        device=run.device,
    )


def _noise(request: Request, start: int) -> tuple[Tensor, list[torch.Generator]]:
    """Latents [B, 2, 4, h, w] of the batch that begins at a pair, and its pairs' generators."""
    seeds = request.seeds[start : start + request.batch]
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
) -> Tensor | None:
    """Clean latents [B, 2, 4, h, w] of one batch, or None when interrupted."""

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
        bar.update()
        if request.callback is not None:
            changed = request.callback(step, timestep, {"latents": latents}) or {}
            latents = changed.get("latents", latents)
        return None if run.interrupted() else latents

    try:
        return denoise(
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
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # outside the handler, so that the failed batch's tensors are gone
    raise OutOfMemoryError(len(noise), _largest_that_fits(run, request, text, len(noise) // 2))


def _largest_that_fits(run: Run, request: Request, text: Sequence[Tensor], batch: int) -> int:
    """Halve until one denoiser call goes through."""
    time = run.denoiser.time_inputs(torch.zeros(1, device=run.device))[0]
    while batch:
        latents = torch.zeros(2, 1, batch, 4, *request.latent_size, device=run.device)
        try:
            run.denoiser(latents, time, text)
            return batch
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        batch //= 2
    return 0


def _pair(
    request: Request,
    recipe: Mapping[str, Any],
    seed: int,
    image: Tensor,
    anomaly: Tensor,
    result: MaskResult,
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
        recipe={**recipe, "seed": seed, "mask": mask},
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


def tensor_of(name: str, value: Tensor, shape: tuple[int | str, ...]) -> Tensor:
    """An override as fp32 on the CPU; letters in `shape` stand for any size."""
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
    return value.detach().float().cpu()


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
