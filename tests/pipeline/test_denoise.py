"""The loop does not wait for its device: no step reads a value that the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import diffusers
import pytest
import torch
from torch import Tensor

from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.ops import bind
from dualdiff_engine.pipeline.background import BackgroundBank
from dualdiff_engine.pipeline.blend import Blend
from dualdiff_engine.pipeline.denoise import Schedule, denoise
from dualdiff_engine.settings import Sampling

META = torch.device("meta")
SCHEDULERS = (
    *("PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"),
    *("LMSDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"),
)


class Shapes:
    """A denoiser of shapes alone: values of its tensors cannot be read."""

    def time_inputs(self, timesteps: Tensor) -> list[Sequence[Tensor]]:
        assert timesteps.device == META
        return [(timestep,) for timestep in timesteps]

    def background_shares(
        self, latents: Tensor, time: Sequence[Tensor], text: Sequence[Tensor]
    ) -> list[Tensor]:
        assert latents.device == META
        return [latents]

    def __call__(
        self,
        latents: Tensor,
        time: Sequence[Tensor],
        text: Sequence[Tensor],
        background: Sequence[Tensor] | None = None,
    ) -> Tensor:
        branches, _, *rest = latents.shape
        return torch.empty(branches, 2, *rest, device=META)


def schedule(name: str, steps: int) -> Schedule:
    make = getattr(diffusers, name)
    return Schedule(lambda: make(beta_schedule="scaled_linear"), steps)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("with_background", [False, True])
@pytest.mark.parametrize("with_placement", [False, True])
def test_no_step_waits_for_the_device(
    name: str, with_background: bool, with_placement: bool
) -> None:
    """Reading a value of a meta tensor, which stands for the device's, is an error."""
    planned = schedule(name, 5)
    scheduler = planned.fresh()
    assert scheduler.timesteps.device.type == "cpu"
    bank = None
    if with_background:
        noiser = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
        bank = BackgroundBank(torch.zeros(2, 4, 8, 8, device=META), noiser, "fresh", 0, 0)
    sampling = Sampling(steps=5).filled(background=with_background, scheduler=name, size=(64, 64))
    seen: list[torch.device] = []

    def step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        seen.append(timestep.device)
        return latents

    start, blend = torch.empty(3, 2, 4, 8, 8, device=META), None
    if with_placement:
        blend = Blend(start[:, 0, 0], start, start, planned.noise_levels())
    latents = denoise(
        cast(Denoiser, Shapes()), bind("reference"), scheduler, start, [], sampling,
        [torch.Generator()] * 3, bank, cast(Any, step_end), blend,
    )  # fmt: skip
    assert latents is not None
    assert latents.device == META
    assert seen == [torch.device("cpu")] * planned.calls
