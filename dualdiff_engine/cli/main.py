"""The `dualdiff` command. Whatever is slow to import is imported when a command needs it."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dualdiff_engine
from dualdiff_engine import settings
from dualdiff_engine.cli import demo as demos
from dualdiff_engine.cli import evaluate as evaluation
from dualdiff_engine.cli import make as making
from dualdiff_engine.cli import tune as tuning
from dualdiff_engine.cli.doctor import doctor, print_table
from dualdiff_engine.cli.export_dataset import export_dataset
from dualdiff_engine.cli.gallery import gallery
from dualdiff_engine.cli.interrupt import INTERRUPTED, TERMINATED, clean_stop
from dualdiff_engine.cli.options import (
    MOST_PAIRS,
    AdapterPath,
    AllowPickle,
    Append,
    Backend,
    Base,
    Batch,
    Count,
    CudaGraph,
    Device,
    Dtype,
    Exported,
    Guidance,
    Json,
    Karras,
    Masker,
    Noise,
    NoiseSeed,
    ObjectMask,
    Order,
    Out,
    Picture,
    Preset,
    Prompt,
    Quiet,
    Scheduler,
    Seed,
    Seeds,
    Size,
    SkipPrk,
    Spacing,
    Steps,
    Timesteps,
    Trust,
    Tune,
)
from dualdiff_engine.cli.placement import (
    Accept,
    Attempts,
    Edge,
    MaskFrom,
    Paste,
    Pictures,
    PlacementOptions,
    Region,
    RegionMasks,
    WindowRatio,
    bounds_of,
    repeated,
)
from dualdiff_engine.cli.train import train
from dualdiff_engine.cli.tune import continued
from dualdiff_engine.errors import (
    AdapterError,
    DataError,
    DualDiffError,
    SettingsError,
)
from dualdiff_engine.export.cli import register, verify_bundle
from dualdiff_engine.settings import Background, Prompts, Sampling

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine
    from dualdiff_engine.folder_writer import FolderWriter
    from dualdiff_engine.pair import Pair

FAILED, SET_ASIDE = 2, 3
_STOPPED = {INTERRUPTED: "interrupted", TERMINATED: "terminated"}

_MEMORY = "out of memory: close other programs, or use a machine or container with more memory"

# remedies for Python callers -> the same for the command line
_REMEDIES = {
    "allow_pickle=True": "--allow-pickle",
    "append=True": "--append",
    "background=Background(…)": "--background PICTURE",
    "pass object_mask, or object_mask='all'": "pass --object-mask MASK, or --object-mask all",
    "exported=FOLDER": "--exported FOLDER",
    "leave out window": "leave out --window",
    "pass trust=True (--trust)": "pass --trust",
}
# `UsageError` of the click that this typer uses, its own copy or the package
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    help="Defect pictures with their masks: exact and fast inference for DualAnoDiff.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
register(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dualdiff {dualdiff_engine.__version__}")
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (by default that of the process); returns the exit code.

    0: done. 2: an error, in one line on stderr. 3: done, but pairs were set aside. 130 and 143:
    stopped by Ctrl-C or SIGTERM; finished pairs are kept.
    """
    try:
        code = app(arguments, prog_name="dualdiff", standalone_mode=False)
    except _UsageError as error:
        message = " ".join(error.format_message().split()).removesuffix(".")
        command = error.ctx.command_path if error.ctx else "dualdiff"
        return _fail(f"{message}: see {command} --help")
    except (AdapterError, DataError) as error:
        # these may list a command or a file per line, to be copied
        return _fail(str(error))
    except DualDiffError as error:
        return _fail(" ".join(str(error).split()))
    except (MemoryError, RuntimeError) as error:
        # not at the top: it loads PyTorch
        from dualdiff_engine.device import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(_MEMORY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            return _fail(_MEMORY)
        return _fail(f"{error.filename or 'a file'}: {error.strerror or error}; check the path")
    if code in _STOPPED:
        _say(f"dualdiff: {_STOPPED[code]}")
    return code or 0


def _fail(message: str) -> int:
    for python, option in _REMEDIES.items():
        message = message.replace(python, option)
    _say(f"dualdiff: {message}")
    return FAILED


def _say(message: str) -> None:
    """A line on stderr; a full or closed one costs nothing but the line."""
    with suppress(OSError):
        typer.echo(message, err=True)


app.command()(train)
app.add_typer(evaluation.app, name="eval")


@app.callback()
def _common(version: Version = False) -> None:
    # messages of libraries are for their callers, not for the user of this command
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
    preset: Preset = None,
    spacing: Spacing = None,
    order: Order = None,
    karras: Karras = None,
    skip_prk: SkipPrk = None,
    timesteps: Timesteps = None,
    size: Size = None,
    image_prompt: Prompt = None,
    anomaly_prompt: Prompt = None,
    negative_prompt: Prompt = None,
    picture: Pictures = None,
    region: Region = None,
    region_masks: RegionMasks = None,
    edge: Edge = None,
    paste: Paste = None,
    window: WindowRatio = None,
    background: Picture = None,
    object_mask: ObjectMask = None,
    background_noise: Noise = None,
    background_noise_seed: NoiseSeed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    cuda_graph: CudaGraph = None,
    tune: Tune = "auto",
    segmenter: Masker = None,
    mask: MaskFrom = "anomaly",
    accept: Accept = None,
    attempts: Attempts = None,
    exported: Exported = None,
    trust: Trust = False,
    allow_pickle: AllowPickle = False,
    append: Append = False,
    quiet: Quiet = False,
) -> None:
    """Draw pairs into a folder: image/, anomaly/, mask/, and manifest.jsonl with their recipes."""
    sampling: dict[str, Any] = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    sampling |= {"preset": preset, "spacing": spacing, "order": order, "karras": karras}
    sampling |= {"skip_prk": skip_prk, "timesteps": _timesteps(timesteps)}
    # of the background, if there is one, else of the pictures
    of_pictures = picture is not None and background is None
    surroundings = _given(
        object_mask=None if of_pictures else object_mask,
        noise=background_noise,
        noise_seed=background_noise_seed,
    )
    placing = PlacementOptions(
        picture, region, region_masks, object_mask if of_pictures else None, edge, paste, window
    )
    placements = placing.placements(partial(demos.statistics, demo) if demo else None)
    chosen = _chosen_seeds(count, seeds, seed, len(placements) or 1)
    options: dict[str, Any] = {
        **chosen,
        "placement": repeated(placements, chosen),
        "sampling": _sampling(sampling, size),
        "background": _surroundings(background, surroundings),
        "segmenter": segmenter,
        "mask": mask,
        "accept": bounds_of(accept),
        "attempts": attempts,
        "progress": not quiet,
    }
    words = _given(image=image_prompt, anomaly=anomaly_prompt, negative=negative_prompt)
    # refused here rather than after loading
    Prompts(**words)
    base, adapter, options = demos.filled(demo, base, adapter, exported, options)
    from dualdiff_engine.folder_writer import FolderWriter

    with FolderWriter(out, append=append) as writer:
        from dualdiff_engine.engine import Engine

        with Engine.from_pretrained(
            base,
            adapter=adapter,
            dtype=dtype,
            device=device,
            backend=continued(writer, backend, device, dtype) if exported is None else backend,
            tune=tune,
            cuda_graph=cuda_graph,
            max_batch=batch,
            allow_pickle=allow_pickle,
            exported=exported,
            trust=trust,
        ) as engine:
            prompts = replace(options.get("prompts") or engine.active.prompts, **words)
            _write_pairs(engine, {**options, "prompts": prompts}, writer, quiet)


def _given(**options: Any) -> dict[str, Any]:
    """Without those left out, whose defaults are the library's."""
    return {name: value for name, value in options.items() if value is not None}


def _chosen_seeds(
    count: int | None, seeds: str | None, first: int | None, default: int
) -> dict[str, Any]:
    """The arguments of `Engine.stream` that select the pairs; default: how many."""
    if seeds is not None:
        if count is not None or first is not None:
            raise SettingsError("--seeds already selects the pairs: leave out --count and --seed")
        return {"seeds": _listed(seeds)}
    if first is None:
        return {"n": count or default}
    chosen = range(first, first + (count or default))
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
                f"--seeds: {part!r} is not a seed or an ascending range: use 1,2,5 or 10:20, at "
                f"most {MOST_PAIRS:,} pairs"
            )
        settings.require_seed(stop - 1)
        chosen.extend(range(start, stop))
    return chosen


def _timesteps(text: str | None) -> tuple[int, ...] | None:
    """The numbers of 999,750,500. Raises SettingsError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise SettingsError(f"--timesteps must be numbers such as 999,750,500, got {text!r}")
    return tuple(map(int, parts))


def _sampling(given: dict[str, Any], size: str | None) -> Sampling:
    """What `Engine.stream` takes, refused here rather than after loading."""
    height, width = (None, None) if size is None else settings.size_from_text(size)
    return Sampling(**given, height=height, width=width)


def _surroundings(picture: Path | None, given: dict[str, Any]) -> Background | None:
    if picture is None:
        if given:
            raise SettingsError(
                "--object-mask and --background-noise… need --background PICTURE, or a mask of "
                "--picture"
            )
        return None
    from dualdiff_engine.pipeline.background import opened

    # pictures that cannot be read or do not match are refused before models are loaded
    return opened(Background(picture, **given))


def _write_pairs(
    engine: Engine, options: dict[str, Any], writer: FolderWriter, quiet: bool
) -> None:
    """Draw what the folder lacks. Raises typer.Exit unless every pair is there in the end."""
    from dualdiff_engine.folder_writer import MANIFEST, QUARANTINE
    from dualdiff_engine.pipeline.beside import Beside

    counts: Counter[str] = Counter()

    def write(finish: Callable[[], Pair]) -> None:
        pair = finish()
        writer.write(pair)
        counts["written"] += 1
        counts["empty"] += pair.empty_mask
        counts["full"] += pair.full_mask
        counts["refused"] += pair.accepted is False

    with clean_stop(engine.interrupt) as stopped:
        # a pair that cannot be written ends the batch that is drawn meanwhile
        beside = Beside(engine.max_batch, engine.interrupt)
        set_aside = partial(beside.submit, writer.quarantine)
        drawn = engine.unfinished(**options, resume=writer, on_fault=set_aside)
        # closed, the generator ends its progress bar, which would run over an error's line
        with closing(drawn), beside:
            for finish in drawn:
                beside.submit(write, finish)
    written, refused = counts["written"], counts["refused"]
    masks = f"empty masks: {counts['empty']}, full masks: {counts['full']}"
    lines = [f"new pairs in {writer.root}: {written} ({masks})"]
    if refused:
        lines.append(f"not accepted in any attempt: {refused}, see their rows in {MANIFEST}")
    if writer.present:
        lines.append(f"{writer.present} of {writer.present + written} pairs were already there")
    if writer.set_aside:
        lines.append(f"set aside as unusable: {writer.set_aside}, see {writer.root / QUARANTINE}")
    # pairs are on the disk: a closed standard output must not look like a failure
    with suppress(OSError):
        for line in lines if not quiet else []:
            typer.echo(line)
    if stopped.is_set():
        raise typer.Exit(stopped.code)
    if writer.set_aside:
        raise typer.Exit(SET_ASIDE)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter: .bin, .safetensors or their folder.")],
    target: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the target.")] = False,
) -> None:
    """Write an adapter as .safetensors. Opens pickles, tensors only: convert only trusted files."""
    if target.exists() and not force:
        raise SettingsError(f"{target} exists: pass --force to overwrite it")
    from dualdiff_engine import adapters

    adapter = adapters.convert(source, target)
    typer.echo(f"{target}: {len(adapter.sites)} sites, {adapter.parameters:,} parameters")
    typer.echo(f"sha256 {adapter.sha256}")


@app.command()
def inspect(
    adapter: Annotated[Path, typer.Argument(help="Adapter file, its folder, or checkpoint-N.")],
    base: Annotated[
        str | None, typer.Option(help="Also check that the adapter fits this base model.")
    ] = None,
    as_json: Json = False,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show what an adapter contains, and whether it fits a base model."""
    from dualdiff_engine import adapters
    from dualdiff_engine.adapters import verdicts

    loaded = adapters.load(adapter, allow_pickle=allow_pickle)
    if base is not None:
        adapters.check_fits(loaded, *_shapes(base))
    summary: dict[str, Any] = {**adapters.summary(loaded).record(), "fits": base}
    summary["presets"] = verdicts.read(summary["file"], summary["sha256"])
    if as_json:
        typer.echo(json.dumps(summary, indent=2))
        return
    blend, presets = summary.pop("blend"), summary.pop("presets")
    summary["branches"] = ", ".join(summary["branches"])
    summary["context_width"] = ", ".join(map(str, summary["context_width"]))
    summary["parameters"] = f"{summary['parameters']:,}"
    summary["background"] = "needed; learnt blend weight per site:" if blend else "none"
    summary["window"] = summary["window"] or "none: whole pictures, or not recorded"
    summary["distilled"] = str(loaded.distilled or "no: guidance needs unconditional rows")
    summary["coupling"] = str(loaded.coupling or "DualAnoDiff's")
    summary["fits"] = base or "not checked: pass --base"
    for name in settings.MEASURED[loaded.distilled is not None]:
        summary[f"preset {name}"] = verdicts.line(presets.get(name))
    rows = ((name.replace("_", " "), value) for name, value in summary.items())
    print_table(chain(rows, ((name, f"{value:.4f}") for name, value in blend.items())))


def _shapes(base: str) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """What `adapters.check_fits` compares with, read without loading the model."""
    from dualdiff_engine.base_model import BaseModel

    model = BaseModel(base)
    return model.site_shapes, model.text_layers


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A dataset by `make`, or a bundle by `export`.")
    ],
    remove: Annotated[
        bool,
        typer.Option(
            "--remove", help="Of a dataset: delete damaged pairs, which make then draws again."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a dataset's pairs, or a bundle's files and graphs, against what was written."""
    if making.is_dataset(folder):
        making.verify(folder, remove=remove, as_json=as_json)
        return
    if remove:
        raise SettingsError(f"--remove is for datasets, and {folder} is none: leave it out")
    verify_bundle(folder, as_json=as_json)


app.command()(doctor)
app.command("tune")(tuning.tune)
app.command("make")(making.make)
app.command("status")(making.status)
app.command("export-dataset")(export_dataset)
app.command()(gallery)
