"""Couplings compared: `python -m dualdiff_engine.bench.demo_couplings WORK`, on the demo's factory.

Trains an adapter per variant on the same base, pictures, steps and seed; draws pairs of the same
seeds; measures them, runs the downstream test, and counts and times a denoiser step. Writes
`couplings.json`, a task at a time. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.bench import clock, machine
from dualdiff_engine.demo.presets import BASE, PRESETS, SAMPLING, Preset, find
from dualdiff_engine.demo.train.adapters import train
from dualdiff_engine.engine import Engine
from dualdiff_engine.evaluation import quality, records
from dualdiff_engine.evaluation.data import Sample, find_pairs
from dualdiff_engine.evaluation.downstream import DownstreamOptions, run
from dualdiff_engine.evaluation.report import markdown_table
from dualdiff_engine.evaluation.tasks import arms_task, training_samples
from dualdiff_engine.folder_writer import FolderWriter

FILE = "couplings.json"
TASKS = ("fabric/hole", "tile/stain", "washer/chip")
# variant -> what is trained otherwise
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "DualAnoDiff": {},
    "DH pattern": {"system": "dh-diff"},
    "no connect": {"cycle": "separate/none/plain/none,separate/none/align/none,"
                   "separate/merge/plain/merge"},
    "no align": {"cycle": "separate/none/plain/none,connect/none/plain/none,"
                 "separate/merge/plain/merge"},
    "no merge": {"cycle": "separate/none/plain/none,connect/none/align/none,"
                 "separate/none/plain/none"},
    "uncoupled": {"cycle": "separate/none/plain/none"},
}  # fmt: skip
# pairs of a timed step
PAIRS, ROUNDS = 8, 7
CPU = torch.device("cpu")
COLUMNS = (
    "variant", "task", "agreement", "by chance", "leakage", "diversity", "empty masks",
    "pixel AP alone", "with the real", "GFLOP/step", "ms/step",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    parser.add_argument("--count", type=int, default=60, help="pairs per variant, at least 3")
    parser.add_argument("--steps", type=int, default=650, help="of training")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(DownstreamOptions().seeds))
    given = parser.parse_args(arguments)
    if given.count < 3:
        parser.error("--count must be 3 or more")
    file = given.out / FILE
    records.check_writable(file)
    options = DownstreamOptions(steps=200, seeds=tuple(given.seeds), size=64)
    for name in given.only or TASKS:
        preset = find(name)
        row = measure(preset, given.work / preset.adapter.name, given.steps, given.count, options)
        before = json.loads(file.read_text("utf-8"))["couplings"] if file.is_file() else {}
        tasks = {**before, preset.name: row}
        ordered = {n: tasks[n] for n in PRESETS if n in tasks}
        records.write(file, {**machine.facts(CPU), "couplings": ordered})
        print(table(ordered), flush=True)


def measure(
    preset: Preset, work: Path, steps: int, count: int, options: DownstreamOptions
) -> dict[str, Any]:
    """A task: every variant's measures, and what the downstream test says."""
    trained = {name: adapter_of(preset, work, name, steps) for name in VARIANTS}
    pairs = {name: drawn(preset, work, name, path, count) for name, path in trained.items()}
    real = training_samples(work / "real", preset.part, preset.defect)
    task = arms_task(pairs, preset.part, preset.defect, options.size)
    result = run(task, options, lambda line: print(f"{preset.name}: {line}", flush=True))
    return {
        "steps": steps,
        "pairs": count,
        "quality": {name: quality.measure(samples, real) for name, samples in pairs.items()},
        "downstream": result,
        "step": step_costs(preset, trained),
    }


def _slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def adapter_of(preset: Preset, work: Path, name: str, steps: int) -> Path:
    """Trained, unless it is there."""
    target = work / _slug(name)
    if not target.exists():
        start = time.perf_counter()
        train(preset, BASE, target, steps=steps, dtype="float32", sample_every=0, **VARIANTS[name])
        print(f"{preset.name}: {name} trained in {time.perf_counter() - start:.0f} s", flush=True)
    return target


def drawn(preset: Preset, work: Path, name: str, adapter: Path, count: int) -> list[Sample]:
    """Pairs of seeds 0, 1, 2, …"""
    folder = work / f"{_slug(name)}.pairs"
    with FolderWriter(folder) as writer, Engine.from_pretrained(BASE, adapter=adapter) as engine:
        options = {**SAMPLING, "prompts": preset.prompts, "resume": writer}
        with closing(engine.stream(list(range(count)), **options)) as pairs:
            for pair in pairs:
                writer.write(pair)
    return find_pairs(folder)


def step_costs(preset: Preset, adapters: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """FLOPs and median milliseconds of a step of each variant, in turns."""
    with ExitStack() as stack, torch.inference_mode():
        calls = {name: _call(preset, path, stack) for name, path in adapters.items()}
        flops = {}
        for name, call in calls.items():
            with FlopCounterMode(display=False) as counter:
                call()
            flops[name] = counter.get_total_flops()
        seconds = clock.interleaved(calls, CPU, rounds=ROUNDS, patience_s=1e9, warm_up=1)
    return {
        name: {"flops": flops[name], "ms": 1e3 * statistics.median(times)}
        for name, times in seconds.items()
    }


def _call(preset: Preset, adapter: Path, stack: ExitStack) -> Callable[[], object]:
    # plain PyTorch, so that every product is counted
    engine = stack.enter_context(
        Engine.from_pretrained(BASE, adapter=adapter, backend="reference", max_batch=PAIRS)
    )
    coupling = engine.active.summary.coupling
    context = engine.encode_prompts(preset.prompts)
    places = None
    if coupling is not None and coupling.aligns:
        tokens = engine.text_encoder.tokenize_pair(preset.prompts)
        places = engine.text_encoder.places(tokens, coupling.placeholder).unflatten(0, (2, 2))
    side = engine.base.sample_size
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 1, PAIRS, 4, side, side, generator=generator)
    return lambda: engine.predict_noise(latents, 500.0, context, None, places)


def table(tasks: Mapping[str, Any]) -> str:
    """A line for every variant and task."""
    rows: list[Sequence[str]] = [COLUMNS]
    for task, row in tasks.items():
        arms = row["downstream"]["arms"]
        for name in VARIANTS:
            agreement, measured = row["quality"][name]["agreement"], row["quality"][name]
            step = row["step"][name]
            rows.append(
                [
                    name, task,
                    *(f"{agreement[f'difference_{x}']:.3f}" for x in ("inside", "chance")),
                    f"{agreement['leakage_outside']:.4f}",
                    f"{measured['diversity']['image']:.3f}",
                    f"{measured['masks']['empty']:.0%}",
                    _ap(arms[name]), _ap(arms[f"real + {name}"]),
                    f"{step['flops'] / 1e9:.1f}", f"{step['ms']:.0f}",
                ]
            )  # fmt: skip
    return markdown_table(rows, texts=2)


def _ap(arm: Mapping[str, Any]) -> str:
    return f"{arm['mean']['pixel_ap']:.3f} ± {arm['spread']['pixel_ap']:.3f}"


if __name__ == "__main__":
    main()
