"""From a checked request to pairs: text, background, noise, denoise, decode, mask.

`generate` is the whole road. It knows no engine: a `Run` holds the parts that it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dualdiff_engine.device import enough_memory, is_out_of_memory, numerics, release_memory
from dualdiff_engine.errors import PairError, SettingsError
from dualdiff_engine.pair import (
    Fault,
    Pair,
    present,
    present_bytes,
    present_mask,
    to_uint8,
)
from dualdiff_engine.pipeline import background as backgrounds
from dualdiff_engine.pipeline import faults
from dualdiff_engine.pipeline.background import Bank, BankOfEach, Surroundings
from dualdiff_engine.pipeline.batches import SMALLER, Stderr
from dualdiff_engine.pipeline.decode import decode
from dualdiff_engine.pipeline.denoise import denoise, draw_latents
from dualdiff_engine.pipeline.encode import PictureLatents
from dualdiff_engine.pipeline.faults import FiniteWatch
from dualdiff_engine.pipeline.masks import MaskResult
from dualdiff_engine.pipeline.placement import Canvas, Placed
from dualdiff_engine.pipeline.request import Request, Run
from dualdiff_engine.pipeline.scores import attempt_seed, cut_to_change, scores_of

T = TypeVar("T")


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
    for finish in unfinished(run, request):
        yield finish()


@torch.inference_mode()
def unfinished(run: Run, request: Request) -> Generator[Callable[[], Pair], None, None]:
    """As `generate`; what is yielded makes the pair, once, in any thread.

    Masks, pasting and scores are made by that call and need no device: it can go on meanwhile.
    """
    if not request.pairs or run.interrupted():
        return
    encoded = PictureLatents(run.vae)
    with _networks(run):
        text = _with_room(run, "while the prompts are encoded", lambda: _text(run, request))
    draws = [Draw(number, seed) for number, seed in request.pairs]
    total = request.schedule.calls * len(draws)
    with tqdm(total=total, disable=not request.progress, unit="call", file=Stderr()) as bar:
        road = _Road(run, request, encoded, text, bar)
        while draws:
            drawn = road.drawn(draws)
            if drawn is None:
                return
            draws = draws[len(drawn) :]
            if request.acceptance is None:
                for one in drawn:
                    yield from road.decoded(one)
            else:
                for pair in _accepted(road, drawn, request.acceptance.attempts):
                    yield partial(_itself, pair)


def _itself(pair: Pair) -> Pair:
    return pair


@dataclass(frozen=True)
class Draw:
    """A pair to draw: its number among those asked for, its seed, and the attempt, from 0."""

    number: int
    seed: int
    attempt: int = 0

    @property
    def noise_seed(self) -> int:
        return attempt_seed(self.seed, self.attempt)


@dataclass(frozen=True)
class Drawn:
    """Clean latents [2, 4, h, w] of a pair, its first bad step or -1, and what it is drawn on."""

    draw: Draw
    latents: Tensor
    bad_step: int
    canvas: Canvas | None


@dataclass(frozen=True)
class _Road:
    """What the stages of a run share. encoded: normal pictures; text: of the prompts."""

    run: Run
    request: Request
    encoded: PictureLatents
    text: Sequence[Tensor]
    bar: tqdm[Any]

    def drawn(self, draws: Sequence[Draw]) -> list[Drawn] | None:
        """As many of the first pairs as fit into a batch; None when interrupted."""
        _check_active(self.run)
        with _networks(self.run):
            count = self.run.batches.next(min(self.request.batch, len(draws)))
            batch = _with_room(
                self.run,
                "while the background is encoded",
                partial(_batch, self.run, self.request, self.encoded, draws[:count]),
            )
            result = _denoise(self.run, self.request, self.text, batch, self.bar)
        if result is None:
            return None
        canvases = batch.placed.canvases if batch.placed else (None,) * count
        # a batch that did not fit is shorter
        return [Drawn(*one) for one in zip(draws, *result, canvases, strict=False)]

    def decoded(self, drawn: Drawn) -> Iterator[Callable[[], Pair]]:
        """What makes the pair of its pictures; nothing, after `on_fault`, if it cannot be used."""
        run, request, canvas = self.run, self.request, drawn.canvas
        fault = faults.of_latents(drawn.bad_step, run.dtype)
        if fault is None:
            doing = "while a pair is decoded"
            with _networks(run):
                image, anomaly = _with_room(run, doing, lambda: decode(run.vae, drawn.latents))
                normal = None
                if canvas is not None:
                    rebuilt = partial(self.encoded.rebuilt, canvas.pixels)
                    normal = _with_room(run, doing, rebuilt)
            fault = faults.of_pictures(image, anomaly)
        if fault is None:
            yield partial(_pair, request, drawn, image, anomaly, normal)
        elif drawn.draw.attempt:
            # an earlier attempt can be used
            return
        elif request.on_fault is None:
            raise PairError(drawn.draw.seed, fault)
        else:
            recipe = request.recipe(drawn.draw.number)
            seed = drawn.draw.seed
            request.on_fault(Fault(seed, fault, {**recipe, "seed": seed}))


def _accepted(road: _Road, drawn: list[Drawn], attempts: int) -> Iterator[Pair]:
    """The pairs of a batch in order, those drawn again whose scores miss a bound.

    Of a pair that misses bounds in every attempt the one that misses fewest is taken.
    """
    numbers: list[int] = [one.draw.number for one in drawn]
    best: dict[int, Pair] = {}
    while drawn:
        again = []
        for one in drawn:
            for finish in road.decoded(one):
                pair = finish()
                known = best.setdefault(one.draw.number, pair)
                if len(pair.missed) < len(known.missed):
                    best[one.draw.number] = pair
            if one.draw.number in best and best[one.draw.number].missed:
                again.append(replace(one.draw, attempt=one.draw.attempt + 1))
        drawn = []
        if again and again[0].attempt < attempts:
            road.bar.total += road.request.schedule.calls * len(again)
            while len(drawn) < len(again):
                more = road.drawn(again[len(drawn) :])
                if more is None:
                    # interrupted: what was good before is finished
                    yield from (best[n] for n in numbers if n in best and not best[n].missed)
                    return
                drawn += more
    yield from (best[n] for n in numbers if n in best)


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
    rows = slice(-request.sampling.rows, None)
    placeholder = None
    if run.coupling is not None and run.coupling.aligns:
        places = run.text_encoder.places(request.tokens, run.coupling.placeholder)
        placeholder = places.unflatten(0, context.shape[:2])[:, rows]
    return run.denoiser.text_inputs(context[:, rows].to(run.device, run.dtype), placeholder)


def _bank(
    run: Run, request: Request, encoded: PictureLatents, draws: Sequence[Draw]
) -> Bank | None:
    """What the image branch reads of the backgrounds of these pairs, call by call."""
    if not request.surroundings:
        return None

    def opened(surroundings: Surroundings) -> backgrounds.BackgroundBank:
        return run.banks.open(
            surroundings.record,
            surroundings.pixels,
            request.given.background_latents,
            request.given.background_noise,
            shape=(request.sampling.rows, 4, *request.latent_size),
            prompts=request.prompts,
            encoded=encoded,
            make_noiser=run.make_noiser,
            device=run.device,
        )

    own = [request.around(draw.number, draw.seed) for draw in draws]
    if len(request.surroundings) == 1 and own[0] is request.surroundings[0]:
        return opened(own[0])
    # equal backgrounds are one
    banks = {tuple(each.record.values()): each for each in own}
    open_banks = {key: opened(each) for key, each in banks.items()}
    return BankOfEach([open_banks[tuple(each.record.values())] for each in own])


def _batch(run: Run, request: Request, encoded: PictureLatents, draws: Sequence[Draw]) -> Batch:
    numbers = [draw.number for draw in draws]
    generators = [torch.Generator().manual_seed(draw.noise_seed) for draw in draws]
    # drawn in any case: the generators go on to the scheduler's own noise
    noise = draw_latents(generators, *request.latent_size)
    if request.given.latents is not None:
        noise = request.given.latents[numbers]
    placed = None
    if request.canvases is not None:
        # the region stays that of the pair in every attempt
        canvases = [request.canvases.canvas(draw.number, draw.seed) for draw in draws]
        placed = Placed.of(canvases, encoded, run.vae.config.scaling_factor, run.device)
    bank = _bank(run, request, encoded, draws)
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
    request: Request, drawn: Drawn, image: Tensor, anomaly: Tensor, normal: Tensor | None
) -> Pair:
    """normal: the normal picture as the VAE rebuilds it, [3, H, W], where there is one."""
    canvas, change, statistics = drawn.canvas, None, None
    decoded = (image, anomaly, normal)
    if canvas is not None and normal is not None:
        image, anomaly = canvas.paste(image, anomaly, normal)
        normal, _ = canvas.paste(normal, normal, normal)
        change, statistics = _change(image, normal), canvas.statistics
    shown = to_uint8(anomaly)
    result = cut_to_change(request.segment(shown), change, request.mask)
    found_in = change if change is not None and request.mask == "change" else shown
    if canvas is not None and normal is not None:
        image, anomaly = canvas.paste_mask(result.mask, image, anomaly)
        normal, _ = canvas.paste_mask(result.mask, normal, normal)
        # the scores are those of the pair that is handed out
        change = _change(image, normal)
    share = canvas.view.share if canvas and canvas.view else 1.0
    scores = scores_of(to_uint8(image), to_uint8(anomaly), result.mask, change, statistics, share)
    missed = request.acceptance.missed(scores) if request.acceptance else ()
    pictures, result = _pictures(request, canvas, decoded, (image, anomaly), result, found_in)
    recipe = {
        **request.recipe(drawn.draw.number),
        "seed": drawn.draw.seed,
        "attempt": drawn.draw.attempt,
        "mask": {
            "threshold": float(result.threshold),
            "area": float(result.area),
            "empty": bool(result.empty),
        },
        **({"window": canvas.view.record()} if canvas and canvas.view else {}),
    }
    return Pair(
        **pictures,
        seed=drawn.draw.seed,
        empty_mask=bool(result.empty),
        full_mask=bool(np.all(result.mask > 0)),
        recipe=recipe,
        scores=scores,
        accepted=None if request.acceptance is None else not missed,
        missed=missed,
    )


def _pictures(
    request: Request,
    canvas: Canvas | None,
    decoded: tuple[Tensor, Tensor, Tensor | None],
    pasted: tuple[Tensor, Tensor],
    result: MaskResult,
    found_in: np.ndarray,
) -> tuple[dict[str, Any], MaskResult]:
    """A pair's pictures as they are handed out, and the result of their mask.

    Those of a window go into pictures of the placement's size. decoded: image, anomaly image and
    the normal picture as rebuilt, not pasted yet. found_in: what the mask was found in, uint8
    [H, W, 3].
    """
    kind = request.output_type
    drawn, drawn_anomaly, normal = decoded
    if canvas is None or canvas.view is None or normal is None:
        image, anomaly = (present(picture, kind) for picture in pasted)
        region = None if canvas is None else canvas.mask
    else:
        *pixels, mask = canvas.whole(drawn, drawn_anomaly, normal, result.mask, found_in)
        image, anomaly = (present_bytes(picture, kind) for picture in pixels)
        region, white = np.array(canvas.view.region), int(np.count_nonzero(mask))
        result = MaskResult(mask, result.threshold, white / mask.size, white == 0)
    pictures = {
        "image": image,
        "anomaly": anomaly,
        "mask": present_mask(result.mask, kind),
        "region": None if region is None else present_mask(region, kind),
    }
    return pictures, result


def _change(image: Tensor, normal: Tensor) -> np.ndarray:
    """|image - normal|, uint8 [H, W, 3]."""
    return np.abs(to_uint8(image).astype(np.int16) - to_uint8(normal)).astype(np.uint8)


def _check_active(run: Run) -> None:
    if not run.is_active():
        raise SettingsError(
            f"the stream draws with {run.adapter!r}, which is no longer active: finish or "
            "close a stream before switching adapters"
        )
