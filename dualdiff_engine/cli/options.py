"""The options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dualdiff_engine.settings import (
    BACKGROUND_GUIDANCE,
    BACKGROUND_STEPS,
    PLAIN_GUIDANCE,
    PLAIN_STEPS,
    PRESETS,
    SPACINGS,
    NoiseMode,
)

_RELEASED = "Default: {}, with a background {}."

# no run is this long; a slip of the finger is
MOST_PAIRS = 1_000_000

FILE = {"exists": True, "dir_okay": False, "readable": True}
Base = Annotated[
    str | None, typer.Option(help="Base model: a Stable Diffusion folder, hub id, or bundle.")
]
AdapterPath = Annotated[
    Path | None, typer.Option(help="Adapter file, its folder, or checkpoint-N.")
]
Out = Annotated[Path, typer.Option(help="Folder to write. An existing run in it is resumed.")]
Count = Annotated[
    int | None, typer.Option("--count", "-n", min=1, max=MOST_PAIRS, help="Number of pairs.")
]
Seeds = Annotated[
    str | None, typer.Option(help="Seeds, one pair each: 1,2,5 or 10:20 (20 excluded).")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the first pair; each next pair adds one.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Pairs computed together.")]
Steps = Annotated[
    int | None,
    typer.Option(
        help=f"Scheduler steps; PNDM makes one denoiser call more. "
        f"{_RELEASED.format(PLAIN_STEPS, BACKGROUND_STEPS)}"
    ),
]
Guidance = Annotated[
    float | None, typer.Option(help=_RELEASED.format(PLAIN_GUIDANCE, BACKGROUND_GUIDANCE))
]
Scheduler = Annotated[
    str | None, typer.Option(help="Diffusers scheduler class (default: the base model's).")
]
Preset = Annotated[
    str | None,
    typer.Option(help=f"{', '.join(PRESETS)}: fills in the steps and options not given here."),
]
Spacing = Annotated[
    str | None, typer.Option(help=f"Of the scheduler's timesteps: {', '.join(SPACINGS)}.")
]
Order = Annotated[int | None, typer.Option(help="Order of the scheduler's solver, 1 to 3.")]
Karras = Annotated[
    bool | None, typer.Option(help="Noise levels as in Karras et al. 2022, or the scheduler's.")
]
SkipPrk = Annotated[
    bool | None, typer.Option(help="Start PNDM without, or with, its Runge-Kutta steps.")
]
Timesteps = Annotated[
    str | None, typer.Option(help="The timesteps themselves, descending: 999,750,500,250.")
]
Size = Annotated[str | None, typer.Option(help="Size in pixels: 512, or 512x768 (HEIGHTxWIDTH).")]
Prompt = Annotated[
    str | None, typer.Option(help="Default: the bundle's for its adapter, else the released one.")
]
Picture = Annotated[Path | None, typer.Option(**FILE, help="Picture whose background is kept.")]
ObjectMask = Annotated[
    str | None,
    typer.Option(
        help="Mask of the object in that picture, in white. With --picture also a folder of masks, "
        "or 'all' for a texture."
    ),
]
Noise = Annotated[
    NoiseMode | None,
    typer.Option(help="Background noise: new at every step, or fixed (default: fresh)."),
]
NoiseSeed = Annotated[int | None, typer.Option(help="Seed of the background noise (default: 0).")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option()]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, … or auto.")]
Backend = Annotated[
    str, typer.Option(help="auto, a backend listed by `dualdiff doctor`, or op=name,…")
]
CudaGraph = Annotated[
    bool | None, typer.Option(help="Use CUDA graphs (default: on every GPU that can).")
]
Tune = Annotated[
    Literal["auto", "never"],
    typer.Option(help="Measure the fastest kernels once per GPU; on a CPU see `dualdiff tune`."),
]
Masker = Annotated[Path | None, typer.Option(**FILE, help="ONNX model that makes the masks.")]
Trust = Annotated[bool, typer.Option("--trust", help="Run TensorRT engines built by others.")]
Exported = Annotated[
    Path | None, typer.Option(help="Folder by `export onnx`, for --backend onnxruntime.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open a .bin file that you trust.")
]
Append = Annotated[
    bool, typer.Option("--append", help="Add to a folder that holds pairs of another recipe.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
