"""The `dualdiff` command. Whatever is slow to import is imported when a command needs it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import dualdiff_engine
from dualdiff_engine import settings
from dualdiff_engine.demo import command as demos
from dualdiff_engine.errors import (
    AdapterError,
    BaseModelError,
    DataError,
    DualDiffError,
    SettingsError,
)
from dualdiff_engine.evaluation import command as evaluation
from dualdiff_engine.settings import Background, NoiseMode, Prompts, Sampling
from dualdiff_engine.stopping import INTERRUPTED, clean_stop
from dualdiff_engine.training.command import train

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine
    from dualdiff_engine.output import FolderWriter

FAILED = 2
# no run is this long; a slip of the finger is
MOST_PAIRS = 1_000_000

# what the library's messages tell Python callers to do, for the command line
_SPOKEN = {
    "allow_pickle=True": "--allow-pickle",
    "background=Background(…)": "--background PICTURE",
    "pass batch=": "pass --batch ",
}
# distribution -> the extra that brings it
_OPTIONAL = {
    "triton": "triton",
    "xformers": "xformers",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime-gpu": "ort-gpu",
    "tensorrt": "tensorrt",
    "torch-fidelity": "eval",
    "lpips": "eval",
}

# `UsageError` of the click that this typer uses, its own copy or the package
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Defect pictures with their masks: exact and fast inference for DualAnoDiff.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dualdiff {dualdiff_engine.__version__}")
        raise typer.Exit


_file = {"exists": True, "dir_okay": False, "readable": True}
Base = Annotated[str | None, typer.Option(help="Stable Diffusion folder (diffusers) or hub id.")]
AdapterPath = Annotated[
    Path | None, typer.Option(help="Adapter file, its folder, or checkpoint-N.")
]
Out = Annotated[Path, typer.Option(help="Folder to write; a run that it holds is continued.")]
Count = Annotated[int | None, typer.Option("--count", "-n", min=1, max=MOST_PAIRS, help="Pairs.")]
Seeds = Annotated[str | None, typer.Option(help="A pair each: 1,2,5 or 10:20 (which ends at 19).")]
Seed = Annotated[int | None, typer.Option(help="Of the first pair, then one up each.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Pairs computed at once.")]
Steps = Annotated[int | None, typer.Option(help="By default 100, with background 50.")]
Guidance = Annotated[float | None, typer.Option(help="By default 2.5, with background 2.0.")]
Scheduler = Annotated[str | None, typer.Option(help="A diffusers class; by default the base's.")]
Size = Annotated[str | None, typer.Option(help="Pixels: 512, or 512x768 (HEIGHTxWIDTH).")]
Prompt = Annotated[str, typer.Option()]
Picture = Annotated[Path | None, typer.Option(**_file, help="Surroundings to keep.")]
ObjectMask = Annotated[Path | None, typer.Option(**_file, help="The object in it, in white.")]
Noise = Annotated[NoiseMode | None, typer.Option(help="New per step, or once; by default fresh.")]
NoiseSeed = Annotated[int | None, typer.Option(help="By default 0.")]
Dtype = Annotated[Literal["auto", "float32", "bfloat16", "float16"], typer.Option()]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, … or auto.")]
Backend = Annotated[str, typer.Option(help="auto, or a backend that `dualdiff doctor` lists.")]
Masker = Annotated[Path | None, typer.Option(**_file, help="ONNX model that makes the masks.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Open a .bin that you trust.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default that of the process); returns the exit code.

    0 done; 2 an error, told in one line on stderr; 130 interrupted, finished pairs are kept.
    """
    try:
        code = app(arguments, prog_name="dualdiff", standalone_mode=False)
    except _UsageError as error:
        message = " ".join(error.format_message().split()).removesuffix(".")
        command = error.ctx.command_path if error.ctx else "dualdiff"
        return _fail(f"{message}: see {command} --help")
    except (AdapterError, DataError) as error:
        # they may hold a command or one file, on a line of its own to be copied
        return _fail(str(error))
    except DualDiffError as error:
        return _fail(" ".join(str(error).split()))
    except OSError as error:
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path")
    if code == INTERRUPTED:
        typer.echo("dualdiff: interrupted", err=True)
    return code or 0


def _fail(message: str) -> int:
    for said, meant in _SPOKEN.items():
        message = message.replace(said, meant)
    typer.echo(f"dualdiff: {message}", err=True)
    return FAILED


app.command()(train)
app.add_typer(evaluation.app, name="eval")


@app.callback()
def _common(version: Version = False) -> None:
    # libraries speak of what their callers did, not of what the user can change
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


app.command("demo")(demos.demo)


@app.command()
def generate(
    out: Out,
    base: Base = None,
    adapter: AdapterPath = None,
    demo: demos.Name = None,
    count: Count = None,
    seeds: Seeds = None,
    seed: Seed = None,
    batch: Batch = None,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: Scheduler = None,
    size: Size = None,
    image_prompt: Prompt = settings.IMAGE_PROMPT,
    anomaly_prompt: Prompt = settings.ANOMALY_PROMPT,
    negative_prompt: Prompt = "",
    background: Picture = None,
    object_mask: ObjectMask = None,
    background_noise: Noise = None,
    background_noise_seed: NoiseSeed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    segmenter: Masker = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Draw pairs into a folder: image/, anomaly/, mask/ and what made them, manifest.jsonl."""
    sampling = _given(steps=steps, guidance=guidance, scheduler=scheduler)
    surroundings = _given(
        object_mask=object_mask, noise=background_noise, noise_seed=background_noise_seed
    )
    options: dict[str, Any] = {
        **_chosen_seeds(count, seeds, seed),
        **_checked_sampling(sampling, size),
        "prompts": Prompts(image_prompt, anomaly_prompt, negative_prompt),
        "background": _surroundings(background, surroundings),
        "segmenter": segmenter,
        "progress": not quiet,
    }
    base, adapter, options = demos.filled(demo, base, adapter, options)
    from dualdiff_engine.output import FolderWriter

    with FolderWriter(out) as writer:
        from dualdiff_engine.engine import Engine

        with Engine.from_pretrained(
            base,
            adapter=adapter,
            dtype=dtype,
            device=device,
            backend=backend,
            max_batch=batch,
            allow_pickle=allow_pickle,
        ) as engine:
            _write_pairs(engine, engine.stream(**options), writer, quiet)


def _given(**options: Any) -> dict[str, Any]:
    """Without those left out, whose defaults are the library's."""
    return {name: value for name, value in options.items() if value is not None}


def _chosen_seeds(count: int | None, seeds: str | None, first: int | None) -> dict[str, Any]:
    """The arguments of `Engine.stream` that say which pairs."""
    if seeds is not None:
        if count is not None or first is not None:
            raise SettingsError("--seeds says which pairs: leave out --count and --seed")
        return {"seeds": _listed(seeds)}
    if first is None:
        return {"n": count or 1}
    chosen = range(first, first + (count or 1))
    for seed in (chosen[0], chosen[-1]):
        settings.require_seed(seed)
    return {"seeds": chosen}


def _listed(text: str) -> list[int]:
    """1,2,10:13 -> 1, 2, 10, 11, 12."""
    chosen: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?::(\d{1,19}))?\s*", part)
        start = int(match[1]) if match else 0
        stop = int(match[2] or start + 1) if match else 0
        if not start < stop <= start + MOST_PAIRS:
            raise SettingsError(
                f"--seeds: {part!r} is neither a seed nor an upward range: use 1,2,5 or 10:20, for "
                f"at most {MOST_PAIRS:,} pairs"
            )
        settings.require_seed(stop - 1)
        chosen.extend(range(start, stop))
    return chosen


def _checked_sampling(given: dict[str, Any], size: str | None) -> dict[str, Any]:
    """The sampling arguments of `Engine.stream`, refused here rather than after loading."""
    if size is None:
        Sampling(**given)
        return given
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", size)
    if match is None:
        raise SettingsError(f"--size must be 512 or 512x768 (HEIGHTxWIDTH), got {size!r}")
    height, width = int(match[1]), int(match[2] or match[1])
    Sampling(**given, height=height, width=width)
    return {**given, "size": (height, width)}


def _surroundings(picture: Path | None, given: dict[str, Any]) -> Background | None:
    if picture is None:
        if given:
            raise SettingsError("--object-mask and --background-noise… need --background PICTURE")
        return None
    background = Background(picture, **given)
    from dualdiff_engine.background import cut_out

    # pictures that cannot be read or do not match are refused before models are
    cut_out(background, 8, 8)
    return background


def _write_pairs(engine: Engine, pairs: Any, writer: FolderWriter, quiet: bool) -> None:
    written = empty = 0
    # closed, the generator ends its progress bar, which would run over an error's line
    with closing(pairs), clean_stop(engine.interrupt) as stopped:
        for pair in pairs:
            writer.write(pair)
            written += 1
            empty += pair.empty_mask
    if not quiet:
        typer.echo(f"new pairs in {writer.root}: {written} (empty masks: {empty})")
    if stopped.is_set():
        raise typer.Exit(INTERRUPTED)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter: .bin, .safetensors or their folder.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the target.")] = False,
) -> None:
    """Write an adapter as .safetensors. Opens pickles, for tensors only: convert what you trust."""
    if target.exists() and not force:
        raise SettingsError(f"{target} exists: pass --force to overwrite it")
    from dualdiff_engine import adapters

    adapter = adapters.convert(source, target)
    typer.echo(f"{target}: {len(adapter.sites)} sites, {adapter.parameters:,} parameters")
    typer.echo(f"sha256 {adapter.sha256}")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter file, its folder, or checkpoint-N.")],
    base: Annotated[str | None, typer.Option(help="A base model that it should fit.")] = None,
    as_json: Json = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show what an adapter holds, and whether it fits a base model."""
    from dualdiff_engine import adapters

    loaded = adapters.load(adapter, allow_pickle=allow_pickle)
    if base is not None:
        adapters.check_fits(loaded, *_shapes(base))
    summary: dict[str, Any] = {**adapters.summary(loaded), "fits": base}
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    blend = summary.pop("blend")
    summary["branches"] = ", ".join(summary["branches"])
    summary["context_width"] = ", ".join(map(str, summary["context_width"]))
    summary["parameters"] = f"{summary['parameters']:,}"
    summary["background"] = "needed; its learnt share per site:" if blend else "none"
    summary["fits"] = base or "not checked: pass --base"
    rows = ((name.replace("_", " "), value) for name, value in summary.items())
    _print_table(chain(rows, ((name, f"{value:.4f}") for name, value in blend.items())))


def _shapes(base: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """What `adapters.check_fits` compares with, read without loading the model."""
    from dualdiff_engine.base_model import BaseModel

    model = BaseModel(base)
    keys = {name: model.unet[name] for name in model.unet if name.endswith(".to_k.weight")}
    sites = {n.removesuffix(".to_k.weight"): (k.shape[0], k.shape[1]) for n, k in keys.items()}
    path = model.folder / "text_encoder" / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{path} cannot be read: the base model is incomplete") from error
    return sites, {f"text_model.encoder.layers.{n}.self_attn": width for n in range(layers)}


@app.command()
def doctor(device: Device = "auto", dtype: Dtype = "auto", as_json: Json = False) -> None:
    """Show versions, devices, and which backend serves each operation."""
    from dualdiff_engine import ops, recipe, request

    chosen_device = request.device_of(device)
    chosen_dtype = request.dtype_of(dtype, chosen_device)
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **recipe.versions()},
        "optional": {name: _installed(name) for name in _OPTIONAL},
        "devices": recipe.devices(),
        "device": str(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "ops": [row._asdict() for row in ops.bind(device=chosen_device, dtype=chosen_dtype).table],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    _print_table(report["versions"].items())
    _print_table(
        (name, version or f"not installed: pip install 'dualdiff-engine[{_OPTIONAL[name]}]'")
        for name, version in report["optional"].items()
    )
    _print_table(
        (name, ", ".join(f"{what} {much}" for what, much in device.items()) or "none")
        for name, device in report["devices"].items()
    )
    typer.echo(f"\noperations on {report['device']} in {report['dtype']}:")
    _print_table((row["op"], f"{row['backend']:<12}{row['reason']}") for row in report["ops"])


def _installed(distribution: str) -> str | None:
    """Its version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print_table(rows: Iterable[tuple[str, object]]) -> None:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
