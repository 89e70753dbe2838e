"""`dualdiff demo`, and what `dualdiff generate --demo` fills in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualdiff_engine.cli.interrupt import clean_stop
from dualdiff_engine.demo.presets import BASE, PRESETS, SAMPLING, find
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Sampling, require_seed

if TYPE_CHECKING:
    from PIL import Image

    from dualdiff_engine.pair import Pair
    from dualdiff_engine.pipeline.regions import RegionStatistics
    from dualdiff_engine.settings import Placement

    # preset, good part, and the pair on it
    Drawn = tuple[str, Image.Image, Pair]

SHEET = "sheet.png"
COLUMNS = 8
# of the good parts in the factory; no adapter was trained or tested on them
CANVAS_SEED = 6_000_000
# a pair without a defect that one can see and that the mask shows is drawn again
PLACED = {"accept": "default", "attempts": 8}

Name = Annotated[str | None, typer.Option(help=f"Use the demo model: {', '.join(PRESETS)}.")]


def filled(
    name: str | None,
    base: str | None,
    adapter: Path | None,
    exported: Path | None,
    options: dict[str, Any],
) -> tuple[str, Path | None, dict[str, Any]]:
    """Base, adapter and `Engine.stream` options of a `generate` command, with or without --demo.

    A bundle, or an export with its base, starts with an adapter of its own. options: as given on
    the command line, which win over the demo's. Raises SettingsError.
    """
    if name is None:
        if base is None:
            raise SettingsError(
                "pass --base and --adapter, --base with a bundle, or --demo washer/stain"
            )
        if adapter is None and exported is None:
            from dualdiff_engine.base_model import BUNDLE

            if not Path(base, BUNDLE).is_file():
                raise SettingsError(f"pass --adapter: {base} is not a bundle, which would hold one")
        return base, adapter, options
    if base is not None or adapter is not None:
        raise SettingsError(
            "--demo already selects base and adapter: leave out --base and --adapter"
        )
    preset = find(name)
    given = {key: value for key, value in options.items() if value is not None}
    own = {key: value for key, value in preset.options().items() if key not in SAMPLING}
    if "sampling" in given:
        given["sampling"] = _sampling(given["sampling"])
    if "placement" in given:
        # the user's pictures are their own backgrounds
        own.pop("background", None)
    return str(BASE), preset.adapter, {**own, **given}


def _sampling(given: Sampling) -> Sampling:
    """What suits the demo where nothing is given; a preset replaces all of it."""
    if given.preset is not None:
        return given
    own = {**SAMPLING, "steps": SAMPLING["steps"] if given.timesteps is None else None}
    return replace(given, **{k: v for k, v in own.items() if getattr(given, k) is None})


def statistics(name: str) -> RegionStatistics:
    """Of the masks that a preset's adapter was trained with. Raises SettingsError."""
    from dualdiff_engine.demo.train.adapters import training_masks
    from dualdiff_engine.pipeline.regions import region_statistics

    return region_statistics(training_masks(find(name)))


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write. An existing run in it is resumed.")
    ] = Path("dualdiff-demo"),
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=10_000, help="Number of pairs.")
    ] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the first pair; each next pair adds one.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Scheduler steps (default: 25).")] = None,
    device: Annotated[str, typer.Option(help="Device: cpu, cuda, … or auto.")] = "auto",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Draw defects on good parts with the small model that ships: pairs, and a contact sheet."""
    require_seed(seed)
    require_seed(seed + count - 1)
    chosen: dict[str, Any] = {} if steps is None else {"steps": steps}
    Sampling(**chosen)
    start = time.monotonic()
    drawn, stopped = _draw(out, count, seed, chosen, device, not quiet)
    path = out / SHEET
    if drawn:
        _sheet(drawn).save(path)
    if drawn and not quiet:
        seconds = time.monotonic() - start
        typer.echo(f"{len(drawn)} pairs in {out}, {seconds:.0f} s")
        typer.echo(f"contact sheet: {path} (good part, image, mask on the image)")
    if not (drawn or stopped or quiet):
        typer.echo(f"all {count} pairs are already in {out}: nothing was drawn")
    if stopped:
        raise typer.Exit(stopped)


def _draw(
    out: Path, count: int, seed: int, chosen: dict[str, Any], device: str, progress: bool
) -> tuple[list[Drawn], int]:
    """Pairs of all presets, each on disk when the next is drawn; the exit code of a stop, or 0."""
    from PIL import Image

    from dualdiff_engine.folder_writer import FolderWriter

    drawn: list[Drawn] = []
    with FolderWriter(out, append=True) as writer:
        from dualdiff_engine.engine import Engine

        with (
            Engine.from_pretrained(BASE, device=device) as engine,
            clean_stop(engine.interrupt) as stopped,
        ):
            for name, seeds in _shared_out(count, seed):
                if stopped.is_set():
                    break
                preset = PRESETS[name]
                engine.load_adapter(preset.adapter, name)
                placements = _placements(name, seeds)
                options = {
                    **SAMPLING, **PLACED, **chosen,
                    "prompts": preset.prompts, "placement": list(placements.values()),
                }  # fmt: skip
                stream = engine.stream(seeds, **options, resume=writer, progress=progress)
                with closing(stream) as pairs:
                    for pair in pairs:
                        writer.write(pair)
                        good = Image.fromarray(placements[pair.seed].picture)
                        drawn.append((name, good, pair))
                engine.unload_adapter(name)
    return drawn, stopped.code


def _shared_out(count: int, seed: int) -> Iterator[tuple[str, list[int]]]:
    """Consecutive seeds per preset; the first presets get one more if needed."""
    start = seed
    for place, name in enumerate(PRESETS):
        share = count // len(PRESETS) + (place < count % len(PRESETS))
        if share:
            yield name, list(range(start, start + share))
        start += share


def _placements(name: str, seeds: list[int]) -> dict[int, Placement]:
    """Seed -> a good part of its own, and on it a region like those of the adapter's training."""
    like, preset = statistics(name), PRESETS[name]
    return {
        seed: preset.placement((CANVAS_SEED + seed) % 2**63, like, paste="mask") for seed in seeds
    }


def _sheet(drawn: list[Drawn]) -> Image.Image:
    from dualdiff_engine import pictures

    parts = []
    for first in range(0, len(drawn), COLUMNS):
        row = drawn[first : first + COLUMNS]
        columns = [[good, p.image, pictures.overlay(p.image, p.mask)] for _, good, p in row]
        parts.append(pictures.grid(columns, [name for name, _, _ in row]))
    return pictures.stacked(parts)
