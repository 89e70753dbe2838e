"""Guidance learnt into an adapter: its conditional prediction becomes its teacher's guided one.

The idea is that of https://arxiv.org/abs/2210.03142, for one guidance scale. The teacher draws
pairs with guidance, and every denoiser call on the way is an example: what it read, and the guided
prediction. So the adapter learns where sampling leads, and needs no pictures; with a background,
only surroundings. A trajectory has one timestep in each of equal parts of the noise schedule, by
chance within the part, so that every number of steps finds timesteps that were trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine import adapters
from dualdiff_engine.adapters import Adapter, Distilled
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Prompts
from dualdiff_engine.training.latents import LatentSet, generator_of, order_of
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.options import TrainingOptions

# pairs that the teacher draws at once, at timesteps of their own
TOGETHER = 4
_SOLVER = "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class Teacher:
    """The adapter that is learnt from, and the guidance scale of its calls."""

    adapter: Adapter
    guidance: float

    @classmethod
    def open(cls, path: str | Path, guidance: float) -> Teacher:
        """Raises AdapterError, and SettingsError for an adapter that holds guidance already."""
        adapter = adapters.load(path)
        if adapter.distilled is not None:
            raise SettingsError(
                f"{path} holds guidance already ({adapter.distilled}): distil from its teacher"
            )
        return cls(adapter, guidance)

    def options(self, options: TrainingOptions) -> TrainingOptions:
        """With the shapes of the teacher, which are those of what is trained."""
        blends = [s.background for s in self.adapter.sites.values() if s.background is not None]
        width = blends[0].reduce.bias.shape[0] if blends else options.blend_width
        return replace(
            options,
            rank=self.adapter.rank,
            background=self.adapter.has_background,
            blend_width=width,
            window=self.adapter.window,
            # as it is in the teacher
            text_encoder=False,
        )

    def told(self, steps: int) -> Distilled:
        """What the file of the trained adapter says of its guidance."""
        return Distilled(self.guidance, self.adapter.sha256, steps)


@dataclass(frozen=True)
class GuidedCalls:
    """M denoiser calls of a teacher, on the CPU, fp32.

    latents and guided, the prediction, [M, 2, 4, h, w]; timesteps [M]; background [M, 4, h, w],
    noised, or None.
    """

    latents: Tensor
    guided: Tensor
    timesteps: Tensor
    background: Tensor | None

    def draw(self, options: TrainingOptions, step: int, _: int = 0) -> GuidedCalls:
        """The calls of an optimizer step, counted from 0: epochs that are each shuffled anew."""
        count = options.per_step
        chosen = order_of(len(self.timesteps), options.seed, step * count, count)
        return self.at(torch.tensor(chosen))

    def split(self, size: int) -> Iterator[GuidedCalls]:
        """Parts of `size` calls."""
        for start in range(0, len(self.timesteps), size):
            yield self.at(slice(start, start + size))

    def at(self, places: Tensor | slice) -> GuidedCalls:
        background = None if self.background is None else self.background[places]
        return GuidedCalls(
            self.latents[places], self.guided[places], self.timesteps[places], background
        )

    def errors(self, network: TrainableNetwork, context: Tensor) -> Tensor:
        """Mean squared error of the conditional prediction by branch and call, [2, M].

        context [2, 1, L, X]: of the prompts.
        """
        device = network.device
        background = None if self.background is None else self.background.to(device)
        predicted = network(
            self.latents.transpose(0, 1).to(device), self.timesteps.to(device), context, background
        )
        guided = self.guided.transpose(0, 1).to(device)
        return F.mse_loss(predicted.float(), guided, reduction="none").flatten(2).mean(2)


def weights(noiser: Any) -> Tensor:
    """What an error counts by timestep, [T], 1 on average: as one of the velocity.

    The velocity (https://arxiv.org/abs/2202.00512) has the same size at all timesteps. An error of
    the noise is one of the velocity times the share of the picture, so that unweighted the first
    steps, which decide where things are, would hardly count.
    """
    kept = noiser.alphas_cumprod.double()
    if noiser.config.prediction_type == "v_prediction":
        return torch.ones_like(kept).float()
    # schedules that end in pure noise keep nothing
    counted = 1 / kept.clamp(min=1e-4)
    return (counted / counted.mean()).float()


def spread(calls: int, timesteps: int, generator: torch.Generator) -> tuple[int, ...]:
    """A timestep in each of `calls` equal parts of the schedule, from the last one down."""
    bounds = [part * timesteps // calls for part in range(calls + 1)]
    chosen = [
        int(torch.randint(low, high, (), generator=generator)) for low, high in pairwise(bounds)
    ]
    # sampling starts with the most noise
    return tuple(timesteps - 1 - place for place in (0, *chosen[1:]))


def guided_calls(
    base: BaseModel,
    teacher: Teacher,
    options: TrainingOptions,
    size: int,
    device: torch.device,
    surroundings: LatentSet | None = None,
    bar: Any = None,
) -> tuple[GuidedCalls, Tensor]:
    """The calls of `options.trajectories` pairs, and the context [2, 1, L, X] of their prompts.

    size: pixels of a side. surroundings: for a teacher with background. bar: updated by pair. A
    function of seed and options alone. The teacher runs in fp32: guidance multiplies rounding.
    """
    from dualdiff_engine.engine import Engine

    drawn: list[GuidedCalls] = []
    with (
        torch.inference_mode(),
        Engine.from_pretrained(
            base.source, device=device, dtype="float32", cuda_graph=False, max_batch=TOGETHER,
            tune="never",
        ) as engine,
    ):  # fmt: skip
        engine.keep_adapter(teacher.adapter, "teacher")
        context = engine.encode_prompts(Prompts(options.image_prompt, options.anomaly_prompt))
        for first in range(0, options.trajectories, TOGETHER):
            pairs = min(TOGETHER, options.trajectories - first)
            generator = generator_of(options.seed, f"trajectory {first}")
            path = _Path(engine, teacher.guidance, context, size, options.trajectory_calls)
            drawn.append(path.calls(pairs, generator, surroundings))
            if bar is not None:
                bar.update(pairs)
        context = context[:, 1:]
    # tensors of inference mode cannot take part in a graph: hand out copies
    return _joined(drawn), context.clone()


@dataclass(frozen=True)
class _Path:
    """How a few pairs are drawn. context [2, 2 (empty, prompt), L, X]; number: of calls."""

    engine: Any
    guidance: float
    context: Tensor
    size: int
    number: int

    def calls(
        self, pairs: int, generator: torch.Generator, surroundings: LatentSet | None
    ) -> GuidedCalls:
        engine, base = self.engine, self.engine.base
        noiser = base.noiser()
        times = spread(self.number, noiser.config.num_train_timesteps, generator)
        scheduler = base.make_scheduler(_SOLVER, {"order": 2, "timesteps": times})
        scheduler.set_timesteps(len(times), device="cpu")
        side = self.size // base.pixels_per_latent
        latents = torch.randn(pairs, 2, 4, side, side, generator=generator)
        latents = (latents * scheduler.init_noise_sigma).to(engine.device)
        around = None if surroundings is None else _around(surroundings, pairs, generator)
        rows = []
        for time in scheduler.timesteps:
            noised = None
            if around is not None:
                noise = torch.randn(around.shape, generator=generator)
                noised = noiser.add_noise(around, noise, time.long().reshape(1))
            guided = self._guided(latents, float(time), noised)
            at = torch.full((pairs,), int(time))
            kept = None if noised is None else noised[1]
            rows.append(GuidedCalls(latents.cpu(), guided.cpu(), at, kept))
            latents = scheduler.step(guided, time, latents).prev_sample
        return _joined(rows)

    def _guided(self, latents: Tensor, time: float, background: Tensor | None) -> Tensor:
        """latents [B, 2, 4, h, w]; background [2 rows, B, 4, h, w], noised -> as the latents."""
        flat = None if background is None else background.flatten(0, 1)
        predicted = self.engine.predict_noise(
            latents.transpose(0, 1).unsqueeze(1), time, self.context, flat
        )
        return self.engine.ops.guided_step(predicted, self.guidance).transpose(0, 1)


def _around(surroundings: LatentSet, pairs: int, generator: torch.Generator) -> Tensor:
    """[2 (grey, surroundings), pairs, 4, h, w]: those of pictures and flips by chance."""
    assert surroundings.background is not None, "encoded with background"
    assert surroundings.grey is not None, "encoded with background"
    known = surroundings.background.flatten(0, 1)
    chosen = known[torch.randint(len(known), (pairs,), generator=generator)]
    return torch.stack([surroundings.grey.expand_as(chosen), chosen])


def _joined(parts: list[GuidedCalls]) -> GuidedCalls:
    background = [part.background for part in parts if part.background is not None]
    return GuidedCalls(
        torch.cat([part.latents for part in parts]).clone(),
        torch.cat([part.guided for part in parts]).clone(),
        torch.cat([part.timesteps for part in parts]).clone(),
        torch.cat(background).clone() if background else None,
    )
