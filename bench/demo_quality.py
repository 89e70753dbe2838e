"""Quality of all demo adapters: `python -m dualdiff_engine.bench.demo_quality PAIRS`.

Draws the pairs that PAIRS/<part>-<defect>/ lacks, measures them, runs the downstream test, and
writes `downstream.json` and `quality.json`. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from dualdiff_engine.bench import demo_tasks
from dualdiff_engine.demo.presets import BASE, PRESETS, Preset, find
from dualdiff_engine.errors import DataError
from dualdiff_engine.evaluation import records, report
from dualdiff_engine.evaluation.data import Sample, find_pairs
from dualdiff_engine.evaluation.downstream import METRICS, DownstreamOptions, Task
from dualdiff_engine.evaluation.tasks import factory_task, training_samples

COUNT = 60
# pairs that share the surroundings of one good part
SHARED = 10
# pixels of a side that networks see: half the pictures', in a quarter of the time; and their steps
SIZE, STEPS = 64, 200


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    parser.add_argument("--count", type=int, default=COUNT, help="pairs per adapter")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(DownstreamOptions().seeds))
    given = parser.parse_args(arguments)
    options = DownstreamOptions(steps=given.steps, seeds=tuple(given.seeds), size=SIZE)
    presets = [find(name) for name in given.only] or list(PRESETS.values())
    files = {kind: given.out / f"{kind}.json" for kind in ("downstream", "quality")}
    for file in files.values():
        records.check_writable(file)
    for preset in presets:
        folder = given.pairs / preset.adapter.name
        draw(preset, folder, given.count)
        pairs = find_pairs(folder)[: given.count]
        _add_quality(files["quality"], preset, pairs)
        _add_downstream(files["downstream"], preset, pairs, options)
    tasks = demo_tasks.read(files["downstream"])
    print(report.downstream(tasks), report.headline(tasks), sep="\n\n")


def draw(preset: Preset, folder: Path, count: int) -> None:
    """Fill a run's folder up to `count` pairs of seeds 0, 1, 2, …

    Where the adapter takes surroundings, ten pairs each share those of one good part of the
    factory, and `object_mask/` says where it is. Raises DataError when the folder holds pairs of
    another adapter.
    """
    from dualdiff_engine.folder_writer import MANIFEST, FolderWriter

    manifest = folder / MANIFEST
    done = manifest.read_bytes().count(b"\n") if manifest.is_file() else 0
    if done and _adapter(find_pairs(folder, fewest=1)) != _shipped(preset):
        raise DataError(f"{folder} holds pairs of another adapter: remove it, to draw new ones")
    if done >= count:
        return
    from dualdiff_engine.engine import Engine

    with FolderWriter(folder) as writer, Engine.from_pretrained(BASE) as engine:
        engine.load_adapter(preset.adapter, preset.name)
        for start in range(done - done % SHARED, count, SHARED):
            seeds = list(range(max(start, done), min(start + SHARED, count)))
            with closing(engine.stream(seeds, **preset.options(start))) as pairs:
                for pair in pairs:
                    _keep_object_mask(preset, folder, start, pair.seed)
                    writer.write(pair)


def _keep_object_mask(preset: Preset, folder: Path, start: int, index: int) -> None:
    """Before the pair itself, so that no pair in the manifest is without."""
    if not preset.background:
        return
    from dualdiff_engine.demo.factory.samples import encode_png, make

    (folder / "object_mask").mkdir(exist_ok=True)
    mask = make(preset.part, seed=start).object_mask
    (folder / "object_mask" / f"{index:05d}.png").write_bytes(encode_png(mask))


def _add_quality(file: Path, preset: Preset, pairs: list[Sample]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train = training_samples(Path(folder), preset.part, preset.defect)
        measured = records.quality_record(pairs, train)
    (found,) = measured["defects"].values()
    whole = _read(file) or {"defects": {}}
    defects = {**whole["defects"], preset.name: found}
    records.write(file, {"versions": measured["versions"], "defects": _ordered(defects)})


def _add_downstream(
    file: Path, preset: Preset, pairs: list[Sample], options: DownstreamOptions
) -> None:
    source = {**demo_tasks.base(), "adapter": _adapter(pairs), "pairs": len(pairs)}

    def task() -> Task:
        return factory_task(pairs, preset.part, preset.defect, options.size)

    def summary(arms: Mapping[str, Any]) -> dict[str, Any]:
        return {"gap_closed": {metric: report.gap_closed(arms, metric) for metric in METRICS}}

    demo_tasks.add(file, preset, source, options, task, summary)


def _ordered(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in PRESETS if name in found}


def _adapter(pairs: list[Sample]) -> str:
    """Short sha256 of the adapters used, comma-separated."""
    return ", ".join(sorted({pair.defect.split()[-1] for pair in pairs}))


def _shipped(preset: Preset) -> str:
    from dualdiff_engine import adapters

    return adapters.load(preset.adapter).sha256[:8]


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


if __name__ == "__main__":
    main()
