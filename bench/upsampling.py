"""What the folded upsampling saves of a denoiser step on this CPU, on the demo model.

`python -m dualdiff_engine.bench.upsampling --output-json bench/results/cpu-upsampling.json`
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.clock import interleaved
from dualdiff_engine.demo.presets import BASE, find
from dualdiff_engine.engine import Engine
from dualdiff_engine.evaluation import records
from dualdiff_engine.model.blocks import Upsampling

PAIRS = 8
CPU = torch.device("cpu")


def run(rounds: int) -> dict[str, Any]:
    """Median seconds of a step in both forms, in turns; after a call of each to warm up."""
    with step(folded=False) as two_steps, step(folded=True) as folded:
        calls = {"two_steps": two_steps, "folded": folded}
        seconds = interleaved(calls, CPU, rounds=rounds, patience_s=1e9, warm_up=1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        **machine.facts(CPU),
        "model": f"the demo, fp32, {PAIRS} pairs, no guidance rows",
        "rounds": len(seconds["folded"]),
        "median_s": medians,
        "ratio": medians["two_steps"] / medians["folded"],
    }


@contextmanager
def step(*, folded: bool) -> Iterator[Callable[[], object]]:
    """A denoiser call of an engine, which folds, or has the folds taken out."""
    preset = find("washer/chip")
    with Engine.from_pretrained(BASE, max_batch=PAIRS, dtype="float32", device="cpu") as engine:
        engine.load_adapter(preset.adapter)
        for module in engine.unet.modules():
            if isinstance(module, Upsampling) and not folded:
                module.release()
        context = engine.encode_prompts(preset.prompts)[:, -1:]
        side = engine.base.sample_size
        latents = torch.randn(2, 1, PAIRS, 4, side, side)
        with torch.inference_mode():
            yield lambda: engine.predict_noise(latents, 500.0, context)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--output-json", type=Path)
    given = parser.parse_args(arguments)
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if given.output_json is not None:
        records.check_writable(given.output_json)
    record = run(given.rounds)
    print(f"a step is {record['ratio']:.3f} times as fast with folded upsampling")
    if given.output_json is not None:
        records.write(given.output_json, record)


if __name__ == "__main__":
    main()
