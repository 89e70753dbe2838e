"""The options that commands share, and how each is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dualdiff_engine.settings import (
    BACKGROUND_GUIDANCE,
    BACKGROUND_STEPS,
    PLAIN_GUIDANCE,
    PLAIN_STEPS,
    NoiseMode,
)

_RELEASED = "Default: {}, with a background {}."

# no run is this long; a slip of the finger is
MOST_PAIRS = 1_000_000

FILE = {"exists": True, "dir_okay": False, "readable": True}
Base = Annotated[str | None, typer.Option(help="Stable Diffusion folder, hub id, or bundle.")]
AdapterPath = Annotated[
    Path | None, typer.Option(help="Adapter file, its folder, or checkpoint-N.")
]
Out = Annotated[Path, typer.Option(help="Folder to write; a run that it holds is continued.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, max=MOST_PAIRS, help="Pairs.")]
Seeds = Annotated[str | None, typer.Option(help="A pair each: 1,2,5 or 10:20 (which ends at 19).")]
Seed = Annotated[int | None, typer.Option(help="Of the first pair, then one up each.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Pairs computed at once.")]
Steps = Annotated[int | None, typer.Option(help=_RELEASED.format(PLAIN_STEPS, BACKGROUND_STEPS))]
Guidance = Annotated[
    float | None, typer.Option(help=_RELEASED.format(PLAIN_GUIDANCE, BACKGROUND_GUIDANCE))
]
Scheduler = Annotated[str | None, typer.Option(help="A diffusers class; by default the base's.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512, or 512x768 (HEIGHTxWIDTH).")]
Prompt = Annotated[str, typer.Option()]
Picture = Annotated[Path | None, typer.Option(**FILE, help="Surroundings to keep.")]
ObjectMask = Annotated[Path | None, typer.Option(**FILE, help="The object in it, in white.")]
Noise = Annotated[NoiseMode | None, typer.Option(help="New per step, or once; by default fresh.")]
NoiseSeed = Annotated[int | None, typer.Option(help="By default 0.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option()]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
Backend = Annotated[
    str, typer.Option(help="auto, a backend that `dualdiff doctor` lists, or op=name,…")
]
CudaGraph = Annotated[
    bool | None, typer.Option(help="Replay captured steps; by default on every GPU that can.")
]
Tune = Annotated[
    Literal["auto", "never"],
    typer.Option(help="Measure the fastest kernels, once per GPU; a CPU: see `dualdiff tune`."),
]
Masker = Annotated[Path | None, typer.Option(**FILE, help="ONNX model that makes the masks.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run TensorRT engines of others.")]
Exported = Annotated[Path | None, typer.Option(help="Of `export onnx`, for --backend onnxruntime.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Open a .bin that you trust.")]
Append = Annotated[
    bool, typer.Option("--append", help="Add to a folder that holds pairs of another recipe.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
