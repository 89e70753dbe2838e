"""`dualdiff train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from dualdiff_engine.cli.interrupt import INTERRUPTED, clean_stop
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import ANOMALY_PROMPT, IMAGE_PROMPT
from dualdiff_engine.training.options import TrainingOptions

Base = Annotated[
    str, typer.Option(help="Base model: a Stable Diffusion folder (diffusers) or hub id.")
]
Data = Annotated[Path | None, typer.Option(help="Pictures in MVTec layout: test/, ground_truth/.")]
Defect = Annotated[
    str | None, typer.Option(help="Name of the defect's folder in test/ and ground_truth/.")
]
Out = Annotated[Path, typer.Option(help="Folder to write. An existing run in it is resumed.")]
System = Annotated[
    Literal["dualanodiff", "dh-diff"],
    typer.Option(
        help="How the branches are coupled. dh-diff: our definition of the pattern of Double Helix "
        "Diffusion, whose authors published no equations."
    ),
]
Annotation = Annotated[
    Literal["anomaly", "mask"],
    typer.Option(help="What the second branch draws: the anomaly on black, or its mask."),
]
Cycle = Annotated[
    str | None,
    typer.Option(
        help="Couple block after block otherwise: attention/exchange/text/exchange,… such as "
        "connect/none/align/none,separate/merge/plain/merge."
    ),
]
Pictures = Annotated[
    int | None, typer.Option(help="Use only the first N pictures, sorted by name (default: all).")
]
Background = Annotated[
    bool, typer.Option("--background", help="Also learn the background; needs object_mask/DEFECT.")
]
TextEncoder = Annotated[
    bool, typer.Option("--text-encoder", help="Also train LoRA on the text encoder.")
]
Rank = Annotated[int, typer.Option(help="Rank of every LoRA.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Batch = Annotated[int, typer.Option(help="Pictures per forward pass.")]
Accumulate = Annotated[int, typer.Option(help="Forward passes per optimizer step.")]
Size = Annotated[
    int | None, typer.Option(help="Side of the pictures in pixels (default: the base model's).")
]
Window = Annotated[
    float | None,
    typer.Option(
        help="Train on windows around the defects: the window's side over the defect's, for "
        "example 2.5 (default: whole pictures)."
    ),
]
Dropout = Annotated[float, typer.Option(help="Probability of training with empty prompts.")]
Flips = Annotated[Literal["none", "horizontal", "vertical", "both"], typer.Option()]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Dtype of the frozen networks.")
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Use less memory and a third more time.")
]
Every = Annotated[int, typer.Option(help="Steps between saved states to resume from.")]
SampleEvery = Annotated[
    int, typer.Option(help="Steps between kept adapters with a contact sheet (0: none).")
]
SaveDtype = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="Dtype of the adapter file.")
]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:1, … or auto.")]
DistillGuidance = Annotated[
    float | None,
    typer.Option(
        help="Learn the guided prediction of --from at this scale: no unconditional rows later. "
        "--data and --defect only with a background, for surroundings."
    ),
]
From = Annotated[
    Path | None, typer.Option("--from", help="Adapter to learn from, and to start at.")
]
Trajectories = Annotated[int, typer.Option(help="Pairs that --from draws to be learnt from.")]
TrajectoryCalls = Annotated[int, typer.Option(help="Its denoiser calls on each of them.")]
# what a distilled adapter has from its teacher, and what only pictures need
_NOT_DISTILLED = (
    *("rank", "blend_width", "background", "text_encoder", "window", "pictures", "latents"),
    *("prompt_dropout", "system", "annotation", "cycle"),
)
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


def train(
    context: typer.Context,
    base: Base,
    out: Out,
    data: Data = None,
    defect: Defect = None,
    distill_guidance: DistillGuidance = None,
    source: From = None,
    trajectories: Trajectories = 64,
    trajectory_calls: TrajectoryCalls = 25,
    system: System = "dualanodiff",
    annotation: Annotation = "anomaly",
    cycle: Cycle = None,
    pictures: Pictures = None,
    background: Background = False,
    text_encoder: TextEncoder = False,
    rank: Rank = 32,
    blend_width: Annotated[
        int, typer.Option(help="Inner width of the background's affine maps.")
    ] = 320,
    size: Size = None,
    window: Window = None,
    flips: Flips = "both",
    latents: Annotated[
        Literal["sample", "mean"],
        typer.Option(help="Draw from the VAE's posterior, or take its mean."),
    ] = "sample",
    steps: Steps = 5000,
    batch: Batch = 4,
    accumulate: Accumulate = 1,
    learning_rate: Annotated[float, typer.Option()] = 2e-5,
    lr_schedule: Annotated[Literal["constant", "cosine"], typer.Option()] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps of rising learning rate at the start.")] = 0,
    weight_decay: Annotated[float, typer.Option()] = 1e-2,
    max_grad_norm: Annotated[
        float, typer.Option(help="Largest gradient norm (0: no clipping).")
    ] = 1.0,
    prompt_dropout: Dropout = 0.0,
    image_prompt: Annotated[str, typer.Option()] = IMAGE_PROMPT,
    anomaly_prompt: Annotated[str, typer.Option()] = ANOMALY_PROMPT,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    gradient_checkpointing: Checkpointing = False,
    checkpoint_every: Every = 500,
    sample_every: SampleEvery = 1000,
    samples: Annotated[int, typer.Option(help="Pairs on a contact sheet.")] = 4,
    sample_steps: Annotated[int, typer.Option(help="Scheduler steps of these pairs.")] = 50,
    save_dtype: SaveDtype = "float32",
    quiet: Quiet = False,
) -> None:
    """Train an adapter from pictures of a defect and their masks. Interrupted runs are resumed."""
    given = locals()
    others = ("context", "base", "data", "defect", "source", "out", "quiet")
    chosen = {name: value for name, value in given.items() if name not in others}
    _check(context, data, defect, source)
    options = TrainingOptions(defect or "", **chosen)
    with clean_stop() as stopped:
        from dualdiff_engine.training.trainer import train_adapter

        result = train_adapter(
            base, data, out, options, teacher=source, progress=not quiet,
            should_stop=stopped.is_set,
        )  # fmt: skip
    if result.adapter is None:
        raise typer.Exit(stopped.code or INTERRUPTED)
    if not quiet:
        typer.echo(f"{result.adapter} after {len(result.losses)} steps")


def _check(
    context: typer.Context, data: Path | None, defect: str | None, source: Path | None
) -> None:
    """Refuse what can be refused before a library is loaded."""
    if source is None and (data is None or defect is None):
        raise SettingsError("pass --data and --defect, or --from and --distill-guidance")
    if data is not None and not data.is_dir():
        raise SettingsError(f"--data: no folder {str(data)!r}")
    if source is None:
        return
    for name in _NOT_DISTILLED:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise SettingsError(f"{option} is that of --from, or for pictures alone: leave it out")
