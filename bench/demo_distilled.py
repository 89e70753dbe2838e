"""Guidance inside the demo adapters: `python -m dualdiff_engine.bench.demo_distilled WORK`.

Distils a demo adapter, measures how far its conditional prediction is from the guided one by
timestep, before and after, and judges pairs of few calls against its teacher's converged run and
released sampler. Writes `distilled.json`. Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.bench import machine
from dualdiff_engine.demo.presets import BASE, PRESETS, Preset, find
from dualdiff_engine.engine import Engine
from dualdiff_engine.evaluation import preset_gate, records
from dualdiff_engine.evaluation.preset_pairs import (
    CONVERGED,
    Drawn,
    demo_subject,
    described,
    draw,
    samplings,
)
from dualdiff_engine.evaluation.report import markdown_table
from dualdiff_engine.settings import DISTILLED, PLAIN_GUIDANCE, RELEASED, Sampling
from dualdiff_engine.training import TrainingOptions, train_adapter
from dualdiff_engine.training.data import find_examples
from dualdiff_engine.training.distillation import GuidedCalls, Teacher, guided_calls
from dualdiff_engine.training.latents import encode
from dualdiff_engine.training.network import TrainableNetwork
from dualdiff_engine.training.trainer import ADAPTER

FILE = "distilled.json"
COUNT = 60
CALLS = (20, 15, 10, 8)
# timesteps, from the last down
BANDS = ((750, 1000), (500, 750), (250, 500), (0, 250))
# of the pairs that errors are measured on, which training does not see
OTHER_SEED, OTHER_PAIRS = 1_000_003, 4
# a small model takes larger steps than SD-1.5
OPTIONS: Mapping[str, Any] = {
    "learning_rate": 2e-3,
    "lr_schedule": "cosine",
    "warmup": 20,
    "weight_decay": 0.0,
    "dtype": "bfloat16",
    "save_dtype": "float16",
    "device": "cpu",
    "sample_every": 0,
    "checkpoint_every": 50,
}
CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), metavar="FOLDER")
    parser.add_argument("--only", action="append", default=[], metavar="PART/DEFECT")
    parser.add_argument("--count", type=int, default=COUNT, help="pairs per sampling, at least 3")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--trajectories", type=int, default=64)
    parser.add_argument("--guidance", type=float, default=PLAIN_GUIDANCE)
    given = parser.parse_args(arguments)
    if given.count < 3:
        parser.error("--count must be 3 or more")
    file = given.out / FILE
    records.check_writable(file)
    for preset in [find(name) for name in given.only] or list(PRESETS.values()):
        case = Case(preset, given.work / preset.adapter.name, given.guidance)
        options = case.options(given.steps, given.trajectories)
        row = {"training": case.trained(options), "errors": case.errors(options)}
        row |= case.judged(given.count)
        before = json.loads(file.read_text("utf-8"))["adapters"] if file.is_file() else {}
        adapters = {**before, preset.name: {**machine.facts(CPU), **row}}
        records.write(file, {"adapters": {n: adapters[n] for n in PRESETS if n in adapters}})
        print(table(row), flush=True)


@dataclass(frozen=True)
class Case:
    """A demo adapter that is distilled. work: the folder of everything that is made."""

    preset: Preset
    work: Path
    guidance: float

    @property
    def adapter(self) -> Path:
        return self.work / "run" / ADAPTER

    def options(self, steps: int, trajectories: int) -> TrainingOptions:
        prompts = self.preset.prompts
        return TrainingOptions(
            defect=self.preset.defect if self.preset.background else "",
            image_prompt=prompts.image,
            anomaly_prompt=prompts.anomaly,
            distill_guidance=self.guidance,
            trajectories=trajectories,
            steps=steps,
            **OPTIONS,
        )

    @property
    def data(self) -> Path | None:
        """Pictures that lend surroundings, as the adapter was trained with."""
        if not self.preset.background:
            return None
        from dualdiff_engine.demo.factory.samples import write_dataset
        from dualdiff_engine.demo.train.adapters import DATA_SEED, PICTURES

        folder = self.work / "data"
        if not folder.exists():
            partial = folder.with_name("data.partial")
            shutil.rmtree(partial, ignore_errors=True)
            write_dataset(
                partial, self.preset.part, [self.preset.defect], good=4, defective=PICTURES,
                seed=DATA_SEED,
            )  # fmt: skip
            partial.rename(folder)
        return folder

    def trained(self, options: TrainingOptions) -> dict[str, Any]:
        """Train; the seconds are those of all calls that it took."""
        clock = self.work / "seconds.json"
        start = time.monotonic()
        if not self.adapter.exists():
            train_adapter(
                BASE, self.data, self.work / "run", options, teacher=self.preset.adapter,
                progress=True,
            )  # fmt: skip
            clock.write_text(json.dumps(time.monotonic() - start))
        return {
            "steps": options.steps,
            "batch": options.batch,
            "learning_rate": options.learning_rate,
            "trajectories": options.trajectories,
            "trajectory_calls": options.trajectory_calls,
            "guidance": self.guidance,
            "dtype": options.dtype,
            "seconds": round(json.loads(clock.read_text()), 1) if clock.exists() else None,
            "bytes": self.adapter.stat().st_size,
        }

    def errors(self, options: TrainingOptions) -> dict[str, Any]:
        """Conditional from guided prediction, by band of timesteps: rms over that of the guided."""
        kept = self.work / "errors.json"
        if not kept.exists():
            kept.write_text(json.dumps(self._errors(options)))
        return json.loads(kept.read_text())

    def _errors(self, options: TrainingOptions) -> dict[str, Any]:
        teacher, base = Teacher.open(self.preset.adapter, self.guidance), BaseModel(BASE)
        options = replace(
            teacher.options(options), seed=OTHER_SEED, trajectories=OTHER_PAIRS, batch=OTHER_PAIRS
        )
        size, around = min(base.picture_size), None
        if self.data is not None:
            vae = base.load_vae(CPU, torch.float32)
            around = encode(vae, find_examples(self.data, options), options, size)
        calls, context = guided_calls(base, teacher, options, size, CPU, around)
        network = TrainableNetwork(base, options, CPU, torch.float32)
        found = {}
        for name, path in (("before", self.preset.adapter), ("after", self.adapter)):
            network.start_at(_parsed(path))
            found[name] = _by_band(network, calls, context)
        return {"timesteps": [list(band) for band in BANDS], **found}

    def judged(self, count: int) -> dict[str, Any]:
        """FLOPs, nearness and verdict of every sampling."""
        names = [f"{DISTILLED} {calls}" for calls in CALLS]
        drawn: dict[str, Drawn] = {}
        rows: dict[str, dict[str, Any]] = {}
        with Engine.from_pretrained(BASE, device="cpu") as engine:
            engine.load_adapter(self.preset.adapter, "teacher")
            engine.load_adapter(self.adapter, DISTILLED)
            guided, conditional = (flops(engine, row_count) for row_count in (2, 1))
            arms = samplings(["fast"], self.guidance, 48)
            arms |= {f"{DISTILLED} {n}": Sampling(preset=DISTILLED, steps=n) for n in CALLS}
            for name, sampling in arms.items():
                own = name in names
                engine.set_adapter(DISTILLED if own else "teacher")
                values, calls = described(engine, sampling)
                work = calls * (conditional if own else guided)
                rows[name] = {"sampling": values.recorded(), "calls": calls, "gflop": work / 1e9}
                drawn[name] = self._drawn(engine, sampling, count)
        found = preset_gate.compare(drawn, ["fast", *names])
        for name, row in rows.items():
            row["fewer_flops"] = rows[RELEASED]["gflop"] / row["gflop"]
            row |= found[name]
            if name not in (CONVERGED, RELEASED):
                checks = preset_gate.checks(found[name], found[RELEASED])
                row["verdict"] = preset_gate.verdict(checks)
        return {"pairs": count, "samplings": rows}

    def _drawn(self, engine: Engine, sampling: Sampling, count: int) -> Drawn:
        subject = demo_subject(self.preset.name)
        drawn = draw(engine, subject, sampling, self.work / "pairs", count, progress=True)
        assert drawn is not None, "nothing interrupts this engine"
        return drawn


def _parsed(path: Path) -> Any:
    from dualdiff_engine import adapters

    return adapters.load(path)


@torch.no_grad()
def _by_band(network: TrainableNetwork, calls: GuidedCalls, context: Tensor) -> list[float]:
    errors = torch.cat([part.errors(network, context).mean(0) for part in calls.split(16)])
    size = calls.guided.square().mean((1, 2, 3, 4))
    found = []
    for low, high in BANDS:
        here = (calls.timesteps >= low) & (calls.timesteps < high)
        found.append(round(float((errors[here].mean() / size[here].mean()).sqrt()), 4))
    return found


@torch.inference_mode()
def flops(engine: Engine, rows: int) -> int:
    """Of a denoiser call of one pair with so many guidance rows, its background pass apart."""
    height, width = (side // engine.base.pixels_per_latent for side in engine.base.picture_size)
    context = engine.encode_prompts()[:, -rows:]
    background = None
    if engine.active.summary.background:
        background = torch.zeros(rows, 4, height, width)
    latents = torch.zeros(2, 1, 1, 4, height, width)
    time = engine.denoiser.time_inputs(torch.tensor([500.0]))[0]
    text = engine.denoiser.text_inputs(context)
    shares = None
    if background is not None:
        shares = engine.denoiser.background_shares(background, time, text)
    with FlopCounterMode(display=False) as counter:
        engine.denoiser(latents, time, text, shares)
    return int(counter.get_total_flops())


def table(row: Mapping[str, Any]) -> str:
    """A row per sampling, as Markdown."""
    head = ["sampling", "calls", "fewer FLOPs", "distance", "overlap", "below 0.8", "leakage", ""]
    rows = [head]
    for name, found in row["samplings"].items():
        near = found.get("nearness", {})
        figures = [near.get(key) for key in ("distance", "overlap_median", "overlap_poor")]
        figures.append(found["measures"]["leakage_outside"]["value"])
        cells = ["" if value is None else f"{value:.3f}" for value in figures]
        gate = found.get("verdict", {}).get("gate", "")
        rows.append([name, str(found["calls"]), f"{found['fewer_flops']:.1f}", *cells, gate])
    return markdown_table(rows)


if __name__ == "__main__":
    main()
