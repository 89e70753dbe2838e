"""`dualdiff eval quality` and `dualdiff eval downstream`; `preset.py` holds the third."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dualdiff_engine.cli.preset import preset
from dualdiff_engine.errors import SettingsError

app = typer.Typer(help="Measure how good pairs are.", rich_markup_mode=None, add_completion=False)

_file = {"exists": True, "dir_okay": False, "readable": True}
_folder = {"exists": True, "file_okay": False, "readable": True}
Pairs = Annotated[
    Path,
    typer.Option(**_folder, help="Pairs: a folder by `dualdiff generate`, or in MVTec layout."),
]
Train = Annotated[
    Path | None, typer.Option(**_folder, help="Training pictures of the adapter, in MVTec layout.")
]
Real = Annotated[Path | None, typer.Option(**_folder, help="Real pictures, in MVTec layout.")]
Defect = Annotated[str | None, typer.Option(help="Folder in test/; needed if there are several.")]
Whole = Annotated[
    Path | None, typer.Option(**_file, help="One object mask for all pairs, in white.")
]
Inception = Annotated[Path | None, typer.Option(help="Weights file for IS, FID and KID.")]
Vgg = Annotated[Path | None, typer.Option(help="Weights file for IC-LPIPS.")]
Out = Annotated[Path | None, typer.Option(help="JSON file for the record.")]
Demo = Annotated[str | None, typer.Option(help="Test on the demo's factory, such as washer/stain.")]
Seeds = Annotated[str, typer.Option(help="One training run per seed.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, not a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


@app.callback()
def _group() -> None:
    pass


app.command()(preset)


@app.command()
def quality(
    pairs: Pairs,
    train: Train = None,
    defect: Defect = None,
    pictures: Annotated[
        int | None,
        typer.Option(min=1, help="Use only the first N training pictures, sorted by name."),
    ] = None,
    object_mask: Whole = None,
    inception: Inception = None,
    vgg: Vgg = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Agreement of the branches, masks, diversity, copies; with weights IS, FID, KID, IC-LPIPS."""
    from dualdiff_engine.evaluation import data, perceptual, records, report

    if out is not None:
        records.check_writable(out)
    if train is None and (defect is not None or pictures is not None):
        raise SettingsError("--defect and --pictures select from --train: pass --train, too")
    if vgg is not None and train is None:
        raise SettingsError(
            "--vgg: IC-LPIPS compares with the training pictures: pass --train, too"
        )
    extra = _extra(inception, vgg)
    samples = data.find_pairs(pairs, object_mask=object_mask)
    real = data.find_real(train, defect)[:pictures] if train is not None else []
    say = _progress(quiet)
    record = records.quality_record(samples, real, extra, say)
    if inception is None:
        say(f"IS, FID, KID: not measured, pass --inception {perceptual.INCEPTION_FILE}")
    if vgg is None and train is not None:
        say(f"IC-LPIPS: not measured, pass --vgg {perceptual.VGG_FILE}")
    _finish({"pairs": str(pairs), **record}, report.quality(record), out, as_json, quiet)


@app.command()
def downstream(
    pairs: Pairs,
    real: Real = None,
    defect: Defect = None,
    demo: Demo = None,
    few: Annotated[
        int, typer.Option(min=2, help="Number of real training pictures to compare with.")
    ] = 8,
    ceiling: Annotated[
        int, typer.Option(min=0, help="Additional real training pictures for a ceiling (0: none).")
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of every training run.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Pictures per step.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures in pixels.")] = None,
    seeds: Seeds = "0,1,2",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a small network on pairs, on few real pictures, and on both; test on unseen ones."""
    from dualdiff_engine.evaluation import data, records, report, tasks
    from dualdiff_engine.evaluation.downstream import DownstreamOptions, run

    if out is not None:
        records.check_writable(out)
    given = {"steps": steps, "batch": batch, "size": size, "seeds": _listed(seeds)}
    options = DownstreamOptions(**{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    if (demo is None) == (real is None):
        raise SettingsError("pass --real FOLDER, or --demo washer/stain")
    if demo is not None:
        from dualdiff_engine.demo.presets import find

        name, preset = demo, find(demo)
        found = data.find_pairs(pairs)
        task = tasks.factory_task(found, preset.part, preset.defect, options.size)
    else:
        assert real is not None
        if defect is None:
            raise SettingsError("--real: choose the defect to test with --defect")
        name, found = defect, data.find_pairs(pairs)
        task = tasks.user_task(found, real, defect, options.size, few, ceiling)
    record = {"tasks": {name: run(task, options, _progress(quiet))}}
    table = report.downstream(record["tasks"])
    _finish({"pairs": str(pairs), **record}, table, out, as_json, quiet)


def _extra(inception: Path | None, vgg: Path | None) -> dict[str, Any]:
    """Measures that need weights, loaded and checked."""
    from dualdiff_engine.evaluation import perceptual

    extra: dict[str, Any] = {}
    if inception is not None:
        extra["inception"] = perceptual.Inception(inception)
    if vgg is not None:
        extra["lpips"] = perceptual.Lpips(vgg).intra_cluster
    return extra


def _progress(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))


def _listed(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise SettingsError(f"--seeds must be numbers such as 0,1,2, got {text!r}")
    return tuple(map(int, parts))


def _finish(
    record: dict[str, Any], table: str, out: Path | None, as_json: bool, quiet: bool
) -> None:
    if out is not None:
        from dualdiff_engine.evaluation import records

        records.write(out, record)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    elif not quiet:
        typer.echo(table)
