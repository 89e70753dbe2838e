"""`dualdiff eval preset`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualdiff_engine.cli.interrupt import clean_stop
from dualdiff_engine.cli.options import (
    FILE,
    AdapterPath,
    AllowPickle,
    Base,
    Batch,
    Device,
    Dtype,
    Prompt,
)
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import (
    MEASURED,
    PRESETS,
    RELEASED,
    Background,
    Sampling,
)

if TYPE_CHECKING:
    from dualdiff_engine.engine import Engine
    from dualdiff_engine.evaluation.downstream import Task
    from dualdiff_engine.evaluation.preset_pairs import Drawn, Subject

# of the networks of the gate `downstream`: a side in pixels, and steps
SIZE, STEPS = 64, 200
# the name of a distilled adapter's teacher in the engine, and what it draws
TEACHER, COMPARED = "its teacher", ("converged", RELEASED)
# a preset was measured and did not pass
FAILED_GATE = 1

Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset",
        help=f"Preset; repeat for more. Default: {', '.join(MEASURED[False])}; of a distilled "
        f"adapter {', '.join(MEASURED[True])}.",
    ),
]
Pairs = Annotated[int, typer.Option(min=3, max=10_000, help="Pairs, of the seeds 0, 1, 2, …")]
Reference = Annotated[
    int, typer.Option(help="Steps of the run that counts as converged (DPM-Solver++).")
]
Guidance = Annotated[float | None, typer.Option(help="Of all samplings (default: as released).")]
Work = Annotated[Path, typer.Option(help="Folder for the pairs. What it holds is not drawn again.")]
Output = Annotated[Path | None, typer.Option("--out", "--output", help="JSON file for the record.")]
Keep = Annotated[
    bool, typer.Option("--keep", help="Write the verdicts beside the adapter, for recipes.")
]
Demo = Annotated[str | None, typer.Option(help="A demo adapter, such as washer/stain.")]
Teacher = Annotated[
    Path | None,
    typer.Option(help="For a distilled adapter: the one it learnt from, which is compared with."),
]
Surroundings = Annotated[
    Path | None, typer.Option(**FILE, help="For adapters with a background: a good part.")
]
Whole = Annotated[
    Path | None, typer.Option(**FILE, help="Mask of the object in that picture, in white.")
]
Downstream = Annotated[
    bool, typer.Option("--downstream", help="Also train networks on the pairs (slow).")
]
Real = Annotated[
    Path | None, typer.Option(help="For --downstream: real pictures, in MVTec layout.")
]
Defect = Annotated[str | None, typer.Option(help="For --downstream: a folder in test/.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, not a table.")]


def preset(
    presets: Presets = None,
    demo: Demo = None,
    base: Base = None,
    adapter: AdapterPath = None,
    teacher: Teacher = None,
    pairs: Pairs = 60,
    reference_steps: Reference = 48,
    guidance: Guidance = None,
    image_prompt: Prompt = None,
    anomaly_prompt: Prompt = None,
    negative_prompt: Prompt = None,
    background: Surroundings = None,
    object_mask: Whole = None,
    downstream: Downstream = False,
    real: Real = None,
    defect: Defect = None,
    work: Work = Path("dualdiff-presets"),
    out: Output = None,
    keep: Keep = False,
    batch: Batch = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare presets with the released sampler, from the same seeds: do their pairs serve as well?

    Exit code 1: a preset failed.
    """
    _check(presets or (), reference_steps, guidance, out)
    words = {"image": image_prompt, "anomaly": anomaly_prompt, "negative": negative_prompt}
    base, adapter, surroundings = _sources(demo, base, adapter, background, object_mask)
    if downstream and demo is None and (real is None or defect is None):
        raise SettingsError("--downstream needs --real FOLDER and --defect NAME, or --demo")
    from dualdiff_engine.engine import Engine

    with Engine.from_pretrained(
        base, adapter=adapter, dtype=dtype, device=device, max_batch=batch,
        allow_pickle=allow_pickle,
    ) as engine:  # fmt: skip
        if keep and not Path(engine.active.summary.file).exists():
            raise SettingsError("--keep: a bundle has no adapter file: pass --base and --adapter")
        names = _suited(engine, presets, guidance)
        held = _beside(engine, teacher)
        chosen = _samplings(names, held or guidance, reference_steps, distilled=held is not None)
        subject = _subject(engine, demo, words, surroundings)
        drawn = _drawn(engine, subject, chosen, work, pairs, quiet)
        record = _record(engine, chosen, drawn, names)
    task = _task(drawn[RELEASED], demo, real, defect) if downstream else None
    _judge(record, drawn, names, task, quiet)
    if keep:
        _keep(record)
    _finish(record, names, out, as_json, quiet)


def _check(
    names: Sequence[str], reference_steps: int, guidance: float | None, out: Path | None
) -> None:
    """Refuse what can be refused before a model is loaded."""
    from dualdiff_engine.evaluation import records

    for name in names:
        Sampling(preset=name)
        if name == RELEASED:
            raise SettingsError(
                f"--preset: {RELEASED} is what others are compared with: choose of "
                f"{', '.join(name for name in PRESETS if name != RELEASED)}"
            )
    Sampling(steps=reference_steps, guidance=guidance)
    if out is not None:
        records.check_writable(out)


def _sources(
    demo: str | None,
    base: str | None,
    adapter: Path | None,
    background: Path | None,
    object_mask: Path | None,
) -> tuple[str, Path | None, Background | None]:
    """Base, adapter and surroundings. Raises SettingsError."""
    from dualdiff_engine.cli import demo as demos
    from dualdiff_engine.pipeline.background import opened

    base, adapter, _ = demos.filled(demo, base, adapter, None, {})
    if demo is not None and (background or object_mask) is not None:
        raise SettingsError("--demo already selects the background: leave out --background")
    if background is None:
        if object_mask is not None:
            raise SettingsError("--object-mask needs --background PICTURE")
        return base, adapter, None
    # one noise per timestep: computed once for all batches
    return base, adapter, opened(Background(background, object_mask, "fixed"))


def _subject(
    engine: Engine, demo: str | None, words: dict[str, str | None], around: Background | None
) -> Subject:
    """What is drawn: with the demo's prompts or the adapter's own, where none are given."""
    from dualdiff_engine.evaluation.preset_pairs import Subject, demo_subject

    own = Subject(engine.active.prompts, lambda start: around)
    subject = own if demo is None else demo_subject(demo)
    given = {name: text for name, text in words.items() if text is not None}
    return replace(subject, prompts=replace(subject.prompts, **given))


def _samplings(
    names: tuple[str, ...], guidance: float | None, reference_steps: int, *, distilled: bool
) -> dict[str, Sampling]:
    from dualdiff_engine.evaluation.preset_pairs import samplings

    return samplings(names, guidance, reference_steps, distilled=distilled)


def _suited(engine: Engine, presets: list[str] | None, guidance: float | None) -> tuple[str, ...]:
    """The presets to measure. Raises SettingsError for one that does not suit the adapter."""
    from dualdiff_engine.evaluation.preset_pairs import described

    distilled = engine.active.summary.distilled is not None
    names = tuple(dict.fromkeys(presets or MEASURED[distilled]))
    for name in names:
        described(engine, Sampling(preset=name, guidance=guidance))
    return names


def _beside(engine: Engine, teacher: Path | None) -> float | None:
    """The guidance that a distilled adapter holds; None of another.

    Its teacher, which it is compared with, is loaded beside it. Raises SettingsError.
    """
    name, distilled = engine.active_adapter, engine.active.summary.distilled
    if distilled is None or name is None:
        if teacher is not None:
            raise SettingsError(f"--teacher: adapter {name!r} is not distilled: leave it out")
        return None
    if teacher is None:
        raise SettingsError(
            f"adapter {name!r} is distilled ({distilled}) and compared with the one that it learnt "
            "from: pass --teacher ADAPTER"
        )
    engine.load_adapter(teacher, TEACHER)
    found = engine.active.summary.sha256
    if found != distilled.teacher:
        raise SettingsError(
            f"--teacher: {str(teacher)!r} ({found[:12]}…) is not the adapter that {name!r} learnt "
            f"from ({distilled.teacher[:12]}…): pass that one"
        )
    engine.set_adapter(name)
    return distilled.guidance


def _turn(engine: Engine, sampling: str, adapter: str | None) -> None:
    """Make the adapter the active one, or its teacher for what it is compared with."""
    taught = TEACHER in engine.adapters and adapter is not None
    if taught:
        engine.set_adapter(TEACHER if sampling in COMPARED else str(adapter))


def _drawn(
    engine: Engine,
    subject: Subject,
    chosen: dict[str, Sampling],
    work: Path,
    pairs: int,
    quiet: bool,
) -> dict[str, Drawn]:
    """Pairs by sampling. Raises typer.Exit when stopped; the same command goes on."""
    from dualdiff_engine.evaluation.preset_pairs import described, draw

    drawn: dict[str, Drawn] = {}
    adapter = engine.active_adapter
    folder = work / (adapter or "adapter")
    with clean_stop(engine.interrupt) as stopped:
        for name, sampling in chosen.items():
            _turn(engine, name, adapter)
            if not quiet:
                calls = described(engine, sampling)[1]
                typer.echo(f"{name}: {pairs} pairs of {calls} denoiser calls", err=True)
            found = draw(
                engine, subject, sampling, folder, pairs, stopped=stopped.is_set, progress=not quiet
            )
            if found is None:
                raise typer.Exit(stopped.code)
            drawn[name] = found
    # the presets come last: their adapter is active again
    return drawn


def _record(
    engine: Engine, chosen: dict[str, Sampling], drawn: dict[str, Drawn], names: tuple[str, ...]
) -> dict[str, Any]:
    """What was drawn with what, and what was measured."""
    from dualdiff_engine.evaluation.preset_gate import compare
    from dualdiff_engine.evaluation.preset_pairs import described
    from dualdiff_engine.pair import versions

    summary, found = engine.active.summary, compare(drawn, names)
    adapter = engine.active_adapter
    for name, sampling in chosen.items():
        _turn(engine, name, adapter)
        values, calls = described(engine, sampling)
        found[name] = {"sampling": values.recorded(), "calls": calls, **found[name]}
    return {
        "versions": versions(),
        "base": engine.base.sha256,
        "adapter": {"file": summary.file, "sha256": summary.sha256},
        "teacher": summary.distilled.teacher if summary.distilled else None,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "pairs": len(drawn[RELEASED].samples),
        "samplings": found,
    }


def _task(drawn: Drawn, demo: str | None, real: Path | None, defect: str | None) -> Task:
    """What the networks of the gate `downstream` are trained with and tested on."""
    from dualdiff_engine.demo.presets import find
    from dualdiff_engine.evaluation import tasks

    if demo is not None:
        part = find(demo)
        return tasks.factory_task(drawn.samples, part.part, part.defect, SIZE)
    assert real is not None
    assert defect is not None
    return tasks.user_task(drawn.samples, real, defect, SIZE)


def _judge(
    record: dict[str, Any],
    drawn: dict[str, Drawn],
    names: tuple[str, ...],
    task: Task | None,
    quiet: bool,
) -> None:
    """Add the verdicts to the record."""
    from dualdiff_engine.evaluation import downstream, preset_gate
    from dualdiff_engine.evaluation.data import load_reduced

    if task is not None:
        arms = {
            name: downstream.Material(*load_reduced(drawn[name].samples, SIZE))
            for name in (RELEASED, *names)
        }
        options = downstream.DownstreamOptions(steps=STEPS, size=SIZE)
        say = (lambda line: None) if quiet else (lambda line: typer.echo(line, err=True))
        record["downstream"] = downstream.run(replace(task, arms=arms), options, say)
    record["presets"] = {}
    for name in names:
        checks = preset_gate.checks(record["samplings"][name], record["samplings"][RELEASED])
        if task is not None:
            checks.append(preset_gate.downstream_check(record["downstream"], name))
        record["presets"][name] = preset_gate.verdict(checks)


def _keep(record: dict[str, Any]) -> None:
    from dualdiff_engine.adapters import verdicts

    shared = {key: record[key] for key in ("pairs", "base", "versions")}
    rows = {
        name: {
            "gate": found["gate"],
            "gates": found["gates"],
            **shared,
            "sampling": record["samplings"][name]["sampling"],
        }
        for name, found in record["presets"].items()
    }
    verdicts.keep(record["adapter"]["file"], record["adapter"]["sha256"], rows)


def _finish(
    record: dict[str, Any], names: tuple[str, ...], out: Path | None, as_json: bool, quiet: bool
) -> None:
    """Write and print the record. Raises typer.Exit when a preset failed."""
    from dualdiff_engine.adapters import verdicts
    from dualdiff_engine.evaluation import preset_gate, records

    if out is not None:
        records.write(out, record)
    if as_json:
        typer.echo(json.dumps(record, indent=2))
    for name in names if not (as_json or quiet) else ():
        found = record["presets"][name]
        line = verdicts.line({**found, "pairs": record["pairs"]})
        typer.echo(f"{preset_gate.table(found)}\n\npreset {name}: {line}\n")
    if any(found["gate"] == verdicts.FAILED for found in record["presets"].values()):
        raise typer.Exit(FAILED_GATE)
