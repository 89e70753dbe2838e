"""A probe of an export: inputs, and what the engine's own networks made of them.

It lets an artefact be checked later, elsewhere, without the base model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import Artefact
from dualdiff_engine.export.run.denoiser import ENCODER, WITH_BACKGROUND, Runner

TIMESTEP = 500.0


@torch.inference_mode()
def write(engine: Engine, path: Path, graphs: Mapping[str, Artefact]) -> None:
    """One call of every network that the active adapter uses, on the released prompts."""
    background = engine.active.summary.background
    one = next(iter(graphs.values()))
    draw = torch.Generator().manual_seed(0)
    size = (4, one.height, one.width)
    ids = engine.text_encoder.tokenize(["", "a vfx with sks", "", "sks"])
    context = engine.encode_prompts()
    timestep = torch.tensor([TIMESTEP])
    latents = torch.randn(2, 1, *size, generator=draw)
    decoded = torch.randn(1, *size, generator=draw)
    probe = {
        "input_ids": ids.float(),
        "last_hidden_state": context.flatten(0, 1),
        "latents": latents,
        "timestep": timestep,
        "latent_sample": decoded,
        "sample": engine.vae.decode(decoded).sample,
    }
    bias = engine.unet.time_inputs(timestep)[0]
    text = engine.unet.text_inputs(context)
    shares = None
    if background:
        probe["background_latents"] = torch.randn(2, *size, generator=draw)
        shares = engine.unet.background_shares(probe["background_latents"], bias, text)
    probe["noise"] = engine.unet(latents.unsqueeze(1), bias, text, shares)
    weight_files.write(path, {n: t.contiguous() for n, t in probe.items()}, {"timestep": TIMESTEP})


def run(path: Path, runners: Mapping[str, Runner]) -> dict[str, tuple[Tensor, Tensor]]:
    """What runners of the graphs make of a probe: by graph, (result, what was expected)."""
    probe = load_file(path)
    (hidden,) = runners["text_encoder"](input_ids=probe["input_ids"].long())
    (sample,) = runners["vae_decoder"](latent_sample=probe["latent_sample"])
    call = {
        "timestep": probe["timestep"],
        "context": probe["last_hidden_state"].unflatten(0, (2, 2)),
    }
    main = "denoiser"
    shares: dict[str, Tensor] = {}
    if "background_latents" in probe:
        main = WITH_BACKGROUND
        recorded = runners[ENCODER](
            latents=probe["background_latents"],
            timestep=call["timestep"],
            context=call["context"][0].contiguous(),
        )
        shares = {f"background_{index}": share for index, share in enumerate(recorded)}
    (noise,) = runners[main](latents=probe["latents"], **call, **shares)
    return {
        "text_encoder": (hidden, probe["last_hidden_state"]),
        main: (noise, probe["noise"]),
        "vae_decoder": (sample, probe["sample"]),
    }
