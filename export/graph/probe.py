"""A probe of an export: inputs, and what the engine's own networks made of them.

It lets an artefact be checked later, elsewhere, without the base model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.export.folder.artefact import ADAPTERS, Artefact
from dualdiff_engine.export.folder.folded import PROBE, read_adapter
from dualdiff_engine.export.graph.widen import cpu_session
from dualdiff_engine.export.run.denoiser import ENCODER, WITH_BACKGROUND, Runner, initializers
from dualdiff_engine.settings import Prompts

TIMESTEP = 500.0
# negative prompt and prompt of both branches, as released
PROMPTS = ("", "a vfx with sks", "", "sks")


def relative(actual: Tensor, expected: Tensor) -> float:
    """Relative L2 error, computed in fp64; infinite where the result is not finite."""
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).norm() / expected.norm())
    return error if torch.isfinite(actual).all() else float("inf")


@torch.inference_mode()
def write(engine: Engine, path: Path, graphs: Mapping[str, Artefact]) -> None:
    """One call of every network that the active adapter uses, on the released prompts."""
    background = engine.active.summary.background
    one = next(iter(graphs.values()))
    draw = torch.Generator().manual_seed(0)
    size = (4, one.height, one.width)
    ids = engine.text_encoder.tokenize([*PROMPTS])
    context = engine.encode_prompts(Prompts(PROMPTS[1], PROMPTS[3]))
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


@torch.inference_mode()
def check(
    folder: Path, stem: str, graphs: Mapping[str, Artefact], report: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Run an adapter's probe with ONNX Runtime on the CPU: by graph its `error` and `tolerance`.

    stem: of the adapter's file. report: as in `report.json`. Raises BackendError when a graph does
    not run.
    """
    _, adapter = read_adapter(folder / ADAPTERS / f"{stem}.safetensors", graphs)
    tensors = {**adapter.sites, **adapter.text}

    def runner(name: str) -> Runner:
        artefact = graphs[name]
        return cpu_session(folder / f"{name}.onnx", artefact, initializers(tensors, artefact))

    rows = {}
    for name, (result, expected) in run(folder / ADAPTERS / f"{stem}{PROBE}", runner).items():
        tolerance = _tolerance(report, name, stem)
        rows[name] = {"error": relative(result, expected), "tolerance": tolerance}
    return rows


def _tolerance(report: Mapping[str, Any], graph: str, stem: str) -> float:
    """As when written; a denoiser that reads the background encoder's shares may add its error."""
    adapters = report["graphs"][graph]["adapters"]
    allowed = float(adapters.get(stem, next(iter(adapters.values())))["tolerance"])
    if graph == WITH_BACKGROUND:
        allowed += float(report["graphs"][ENCODER]["adapters"][stem]["tolerance"])
    return allowed


def run(path: Path, runner: Callable[[str], Runner]) -> dict[str, tuple[Tensor, Tensor]]:
    """What runners of the graphs make of a probe: by graph, (result, what was expected).

    runner: makes one by the graph's name; each is dropped before the next is made.
    """
    probe = load_file(path)
    (hidden,) = runner("text_encoder")(input_ids=probe["input_ids"].long())
    (sample,) = runner("vae_decoder")(latent_sample=probe["latent_sample"])
    call = {
        "timestep": probe["timestep"],
        "context": probe["last_hidden_state"].unflatten(0, (2, 2)),
    }
    main = "denoiser"
    shares: dict[str, Tensor] = {}
    if "background_latents" in probe:
        main = WITH_BACKGROUND
        recorded = runner(ENCODER)(
            latents=probe["background_latents"],
            timestep=call["timestep"],
            context=call["context"][0].contiguous(),
        )
        shares = {f"background_{index}": share for index, share in enumerate(recorded)}
    (noise,) = runner(main)(latents=probe["latents"], **call, **shares)
    return {
        "text_encoder": (hidden, probe["last_hidden_state"]),
        main: (noise, probe["noise"]),
        "vae_decoder": (sample, probe["sample"]),
    }
