"""`dualdiff make`, `status` and `verify`: datasets by a job file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualdiff_engine.cli.export_dataset import told
from dualdiff_engine.cli.interrupt import clean_stop
from dualdiff_engine.cli.options import FILE, Json, Quiet
from dualdiff_engine.errors import SettingsError

if TYPE_CHECKING:
    from tqdm import tqdm

    from dualdiff_engine.dataset.make import Made, Maker
    from dualdiff_engine.dataset.plan import Task
    from dualdiff_engine.dataset.status import Status
    from dualdiff_engine.dataset.supervisor import Supervisor
    from dualdiff_engine.dataset.verify import Verified

FAILED, SET_ASIDE = 2, 3
_MOST_TOLD = 20

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The dataset: the job's out.")]


@contextmanager
def _extra() -> Iterator[None]:
    """Turn a missing package into the remedy."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("pydantic", "yaml"):
            raise
        raise SettingsError(
            f"jobs need {error.name}, which is not installed: pip install "
            "'dualdiff-engine[dataset]'"
        ) from error


def make(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="The job file, such as job.yaml.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; draw nothing.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(help="Draw only every n-th pair from i on: i/n, for job arrays."),
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a field of the job: limits.batch=8, defects.0.pairs=5."),
    ] = None,
    reject: Annotated[
        Path | None,
        typer.Option(**FILE, help="Set these pairs aside and draw others: product/defect/NNNNNN."),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Make a dataset of pairs by a job file; what is there is not drawn again."""
    with _extra():
        from dualdiff_engine.dataset import job_file
        from dualdiff_engine.dataset.make import Maker
        from dualdiff_engine.dataset.plan import Shard

    part = Shard() if shard is None else Shard.parse(shard)
    maker = Maker(job_file.load(job, change or ()), part)
    if dry_run:
        _show_plan(maker)
        return
    running: list[Supervisor] = []

    def stop() -> None:
        for supervisor in running:
            supervisor.stop()

    with clean_stop(stop) as stopped, _bar(quiet) as bar:

        def started(supervisor: Supervisor, left: int) -> None:
            running.append(supervisor)
            # asked to stop while things were checked
            if stopped.is_set():
                supervisor.stop()
            bar.reset(left)

        def on_row(task: Task, verdict: str) -> None:
            bar.set_description(task.defect, refresh=False)
            bar.update(verdict == "accepted")

        made = maker.run(reject=reject, on_row=on_row, started=started)
    if not quiet:
        # pairs are on the disk: a closed standard output must not look like a failure
        with suppress(OSError):
            _show_made(maker, made)
    if stopped.is_set():
        raise typer.Exit(stopped.code)
    with told(quiet):
        for form, done in maker.export():
            if done is not None and not quiet:
                typer.echo(f"{form}: {done.pairs} pairs, {done.good} normal pictures")
    if made.missing or made.killed:
        raise typer.Exit(SET_ASIDE)


def _bar(quiet: bool) -> tqdm[Any]:
    from tqdm import tqdm

    from dualdiff_engine.pipeline.batches import Stderr

    return tqdm(total=0, disable=quiet, unit="pair", file=Stderr())


def _show_plan(maker: Maker) -> None:
    from dualdiff_engine.files import in_words

    left = Counter(task.defect for task in maker.left())
    for source in maker.checked.sources:
        wanted = len(maker.shard.numbers(source.spec.pairs))
        pictures = f", {len(source.pictures)} pictures" if source.pictures else ""
        typer.echo(f"{source.name}: {left[source.name]} of {wanted} pairs to draw{pictures}")
    total, devices = left.total(), Counter(maker.devices)
    where = ", ".join(f"{count} on {device}" for device, count in devices.items())
    typer.echo(f"total: {total} pairs, at most {in_words(maker.space())}; workers: {where}")
    seconds = maker.seconds_per_pair()
    if seconds is None:
        typer.echo("time: not known before the first pairs of this dataset are drawn")
    else:
        typer.echo(f"time: about {_duration(seconds * total)}, at the pace of the last run")


def _show_made(maker: Maker, made: Made) -> None:
    outcome = made.outcome
    for name, wanted in made.wanted.items():
        typer.echo(
            f"{name}: {made.accepted[name]} of {wanted} pairs, {outcome.drawn[name]} of them new"
        )
    if outcome.rejected:
        reasons = ", ".join(f"{name} {count}" for name, count in outcome.rejected.items())
        typer.echo(f"set aside: {reasons}; see {maker.root / 'quarantine'}")
    for name, why in outcome.raised.items():
        typer.echo(f"{name}: some pairs cannot be drawn: {why}")
    if made.missing:
        missing = ", ".join(f"{name} {count}" for name, count in made.missing.items())
        typer.echo(f"missing: {missing}")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "a minute or less"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def status(folder: Folder, as_json: Json = False) -> None:
    """Show how far a dataset is, also while it is made."""
    from dualdiff_engine.dataset.status import read

    found = read(folder)
    if as_json:
        typer.echo(json.dumps(found.record(), indent=2))
        return
    _show_status(found)


def _show_status(found: Status) -> None:
    for defect in found.defects:
        aside = ", ".join(f"{name} {count}" for name, count in defect.set_aside.items()) or "none"
        rate = "" if defect.rate is None else f"; {defect.rate:.0f} an hour"
        typer.echo(
            f"{defect.name}: {defect.accepted} of {defect.wanted} pairs; set aside: {aside}{rate}"
        )
    for worker in found.workers:
        typer.echo(
            f"worker {worker.name}: {worker.state}, {worker.device} on {worker.host}, last sign of "
            f"life {worker.silent:.0f} s ago"
        )
    if found.left == 0:
        typer.echo("complete")
    elif found.left is not None:
        typer.echo(f"left: about {_duration(found.left)}")
    elif any(worker.state == "alive" for worker in found.workers):
        typer.echo("left: not known before some pairs are drawn")
    else:
        typer.echo("not complete, and no worker is drawing: run dualdiff make")


def is_dataset(folder: Path) -> bool:
    """Whether `make` wrote a folder, or has begun to."""
    from dualdiff_engine.dataset import layout

    return any((folder / name).exists() for name in (layout.RUN, layout.STORE))


def verify(folder: Path, *, remove: bool, as_json: bool) -> None:
    """Compare every pair of a dataset with the hashes in its row, and the folders with the plan."""
    from dualdiff_engine.dataset.verify import verify as compared

    found = compared(folder, remove=remove)
    if as_json:
        typer.echo(json.dumps({"sound": found.sound, "faults": found.faults}, indent=2))
    else:
        _show_verified(found)
    if found.faults:
        raise typer.Exit(FAILED)


def _show_verified(found: Verified) -> None:
    typer.echo(f"{found.sound} pairs are as they were written")
    for line in found.faults[:_MOST_TOLD]:
        typer.echo(line, err=True)
    if (more := len(found.faults) - _MOST_TOLD) > 0:
        typer.echo(f"and {more} more", err=True)
