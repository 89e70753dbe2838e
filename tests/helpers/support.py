"""What several test files need: the golden cases and how errors are measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dualdiff_engine import Engine
from dualdiff_engine.adapters.fold import diffusers_name
from dualdiff_engine.model.cuda_graph import Run

DATA = Path(__file__).parents[1] / "data"
CASES = ("dual", "bcm")


@dataclass(frozen=True)
class Golden:
    """Outputs of the released program; see tests/data/README.md."""

    name: str
    settings: dict[str, Any]
    denoiser: dict[str, Tensor]
    pipeline: dict[str, Tensor]

    @property
    def folder(self) -> Path:
        return DATA / self.name

    @property
    def background(self) -> bool:
        return self.name == "bcm"


def load_golden(name: str) -> Golden:
    folder = DATA / name
    return Golden(
        name,
        json.loads((folder / "case.json").read_text()),
        load_file(folder / "denoiser.safetensors"),
        load_file(folder / "pipeline.safetensors"),
    )


def golden_engine(name: str, **options: Any) -> Engine:
    folder = DATA / name
    return Engine.from_pretrained(
        folder / "model", adapter=folder / "adapter", allow_pickle=True, **options
    )


class Recorder:
    """Captures by running, and overwrites its results in every replay, as a graph does."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run: Run) -> Run:
        self.captures += 1
        results = run()

        def replay() -> list[Tensor]:
            for kept, new in zip(results, run(), strict=True):
                kept.copy_(new)
            return results

        return replay


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, computed in fp64."""
    expected = expected.double()
    return float((actual.double() - expected).norm() / expected.norm())


def by_branch(rows: Tensor) -> Tensor:
    """Released row order [P·2, ...], branch fastest, -> [2, P, ...]."""
    return rows.unflatten(0, (-1, 2)).transpose(0, 1).contiguous()


def noised_background(engine: Engine, golden: Golden) -> Tensor | None:
    if not golden.background:
        return None
    d = golden.denoiser
    return engine.base.noiser().add_noise(
        d["background_latent"], d["background_noise"], d["timestep"].long()
    )


def denoiser_call(engine: Engine, golden: Golden) -> tuple[Tensor, dict[str, Tensor]]:
    """(noise, output of every site before the block's residual add), as [2, P, ...]."""
    d = golden.denoiser
    layers: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            layers[diffusers_name(name)] = (output - inputs[1]).unflatten(0, (2, -1))

        return hook

    sites = [(n, m) for n, m in engine.unet.named_modules() if n.endswith(("attn1", "attn2"))]
    hooks = [site.register_forward_hook(keep(name)) for name, site in sites]
    try:
        noise = engine.predict_noise(
            by_branch(d["sample"]).unsqueeze(2),
            float(d["timestep"]),
            by_branch(d["encoder_hidden_states"]),
            noised_background(engine, golden),
        )
    finally:
        for hook in hooks:
            hook.remove()
    return noise.squeeze(2), layers


def run_pipeline(engine: Engine, golden: Golden, **options: Any) -> tuple[list[Tensor], Tensor]:
    """(latents after every denoiser call, decoded pictures), in released row order."""
    p = golden.pipeline
    steps: list[Tensor] = []

    def keep(engine: Engine, step: int, timestep: Tensor, inputs: dict[str, Tensor]) -> Any:
        assert step == len(steps)
        steps.append(inputs["latents"].flatten(0, 1).clone())
        return inputs

    if golden.background:
        options["background_latents"] = p["background_latent"]
        options["background_noise"] = p["background_noise_per_step"]
    pairs = engine.generate(
        latents=p["latents_in"].unflatten(0, (-1, 2)),
        steps=golden.settings["steps"],
        guidance=golden.settings["guidance_scale"],
        output_type="pt",
        callback_on_step_end=keep,
        **options,
    )
    return steps, torch.stack([picture for pair in pairs for picture in (pair.image, pair.anomaly)])
