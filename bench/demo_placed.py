"""Do placed pairs pay? `python -m dualdiff_engine.bench.demo_placed PAIRS`, for the demo adapters.

The good pictures that all arms of the downstream test train with are the canvases. Draws what
PAIRS/<arm>/<part>-<defect>/ lacks, runs the test, and writes `downstream-placed.json`. Interrupted,
it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from dualdiff_engine import adapters
from dualdiff_engine.bench import demo_quality, demo_tasks
from dualdiff_engine.demo.presets import BASE, PRESETS, SAMPLING, Preset, find
from dualdiff_engine.evaluation import records, report
from dualdiff_engine.evaluation.data import Sample, find_pairs
from dualdiff_engine.evaluation.downstream import DownstreamOptions, Task
from dualdiff_engine.evaluation.tasks import GOOD, GOOD_SEED, arms_task
from dualdiff_engine.folder_writer import MANIFEST, FolderWriter

FILE = "downstream-placed.json"
COUNT = 60
BATCH = 12
# arm -> how its pairs are placed
PLACED: Mapping[str, Mapping[str, Any]] = {
    "placed": {"paste": "region"},
    "pasted to the mask": {"paste": "mask"},
}
ACCEPTED = "accepted"
ACCEPT: Mapping[str, Any] = {"accept": "default", "attempts": 4}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    parser.add_argument("--count", type=int, default=COUNT, help=f"pairs per arm, at most {GOOD}")
    parser.add_argument("--steps", type=int, default=demo_quality.STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(DownstreamOptions().seeds))
    given = parser.parse_args(arguments)
    if not 2 <= given.count <= GOOD:
        parser.error(f"--count must be from 2 to {GOOD}")
    options = DownstreamOptions(steps=given.steps, seeds=tuple(given.seeds), size=demo_quality.SIZE)
    file = given.out / FILE
    records.check_writable(file)
    for preset in [find(name) for name in given.only] or list(PRESETS.values()):
        measure(file, preset, given.pairs, given.count, options)
    print(report.downstream(demo_tasks.read(file)))


def measure(
    file: Path, preset: Preset, pairs: Path, count: int, options: DownstreamOptions
) -> None:
    """Draw what is missing of a preset's arms, and add its task to the record."""
    arms: dict[str, list[Sample]] = {}
    for name, how in {**PLACED, ACCEPTED: {"paste": "mask"}}.items():
        folder = pairs / name.replace(" ", "-") / preset.adapter.name
        draw(preset, folder, count, how, ACCEPT if name == ACCEPTED else {})
        arms[name] = kept(folder, only_accepted=name == ACCEPTED)
    drawn_by = adapters.load(preset.adapter).sha256[:8]
    source = {
        **demo_tasks.base(),
        "adapter": drawn_by,
        "pairs": {name: len(x) for name, x in arms.items()},
    }

    def task() -> Task:
        return arms_task(arms, preset.part, preset.defect, options.size)

    demo_tasks.add(file, preset, source, options, task)


def draw(
    preset: Preset,
    folder: Path,
    count: int,
    how: Mapping[str, Any],
    accept: Mapping[str, Any],
) -> None:
    """Fill a folder with a pair on each of `count` good parts, in regions as in training."""
    from dualdiff_engine.cli.demo import statistics
    from dualdiff_engine.engine import Engine

    like = statistics(preset.name)
    placements = [preset.placement(GOOD_SEED + n, like, **how) for n in range(count)]
    options = {**SAMPLING, "prompts": preset.prompts, **accept}
    with (
        FolderWriter(folder) as writer,
        Engine.from_pretrained(BASE, max_batch=BATCH) as engine,
    ):
        engine.load_adapter(preset.adapter, preset.name)
        seeds = list(range(count))
        stream = engine.stream(seeds, placement=placements, resume=writer, **options)
        with closing(stream) as pairs:
            for pair in pairs:
                writer.write(pair)


def kept(folder: Path, *, only_accepted: bool) -> list[Sample]:
    """The pairs of a folder, in order. Those without a mask are dropped by the test."""
    rows = [json.loads(line) for line in (folder / MANIFEST).read_text("utf-8").splitlines()]
    samples = find_pairs(folder)
    return [
        sample
        for sample, row in zip(samples, rows, strict=True)
        if row["accepted"] or not only_accepted
    ]


if __name__ == "__main__":
    main()
