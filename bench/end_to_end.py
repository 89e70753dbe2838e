"""From prompts to PNG files: seconds per pair by stage, of the engine and the released way.

`dualdiff-bench --end-to-end --preset fast`. Of long schedules some calls are made and all counted.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.step import measure, peers, random_base
from dualdiff_engine.bench.step.case import DEMO, Case, RandomWeights, calls_of
from dualdiff_engine.bench.step.case import random_tensors as adapter_tensors
from dualdiff_engine.bench.step.workers import Entry, answer_of
from dualdiff_engine.demo.presets import BASE
from dualdiff_engine.demo.presets import PRESETS as DEMO_PRESETS
from dualdiff_engine.device import keep_freed_blocks
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import DualDiffError
from dualdiff_engine.evaluation.report import markdown_table
from dualdiff_engine.folder_writer import FolderWriter
from dualdiff_engine.ops import BACKENDS
from dualdiff_engine.pair import Pair, to_uint8
from dualdiff_engine.pipeline.beside import Beside
from dualdiff_engine.pipeline.masks import extract_mask
from dualdiff_engine.settings import Background, Prompts, Sampling

STAGES = ("text", "denoise", "decode", "masks", "files")
PEERS = ("released", "engine", *(f"engine-{name}" for name in BACKENDS))
PROMPTS = Prompts("a part with a piece of sks", "a piece of sks")
# batches of a whole run: the second is drawn while the first is written
BATCHES = 2
# calls that are made where a schedule takes too long
FEW = 3
COLUMNS = ("peer", "dtype", "calls", *STAGES, "s per pair", "of a run", "speed-up", "TFLOP")


@dataclass(frozen=True)
class Job:
    """What is drawn. timed: calls that are made of the case's; base, adapter: as on a disk."""

    case: Case
    base: Path
    adapter: Path
    device: str
    timed: int

    def calls(self, peer: str) -> int:
        """Of a pair's schedule: the released program knows its own alone."""
        own = calls_of("released", self.case.background)
        return own if peer == "released" else self.case.steps

    def made(self, peer: str) -> int:
        return min(self.timed, self.calls(peer))

    def picture(self) -> Image.Image:
        """The background: any picture costs the same."""
        height, width = self.case.scale * self.case.height, self.case.scale * self.case.width
        pixels = self.case.draw("picture", height, width, 3).mul(64).add(128).clamp(0, 255)
        return Image.fromarray(pixels.to(torch.uint8).numpy())


class Road(Protocol):
    """Built from a job. `stages` draws a batch one stage after the other: seconds per pair.

    `whole` draws batches as users get them and returns the seconds per pair; None where it says
    nothing more than the stages.
    """

    def stages(self, number: int, out: Path) -> dict[str, float]: ...

    def whole(self, number: int, out: Path) -> float | None: ...


class ReleasedRoad:
    """Pair after pair in fp32, each with its prompts, both pictures decoded together."""

    def __init__(self, job: Job, entry: Entry) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel, CLIPTokenizer

        self.job, self.device = job, torch.device(job.device)
        one = Case(**{**asdict(job.case), "batch": 1, "steps": job.calls("released")})
        self.peer = peers.Released(one, self.device, torch.float32)
        self.tokenizer = CLIPTokenizer.from_pretrained(job.base / "tokenizer")
        self.text: Any = CLIPTextModel.from_pretrained(job.base / "text_encoder")
        self.vae: Any = AutoencoderKL.from_pretrained(job.base / "vae")
        for network in (self.text, self.vae):
            torch.nn.Module.to(network, self.device, torch.float32)

    def stages(self, number: int, out: Path) -> dict[str, float]:
        job, watch = self.job, Watch(self.device)
        words = [PROMPTS.negative, PROMPTS.image, PROMPTS.negative, PROMPTS.anomaly]
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(words, padding="max_length", max_length=length, return_tensors="pt")
        self.text(ids.input_ids.to(self.device))
        watch.mark("text")
        if job.case.background:
            height, width = job.case.scale * job.case.height, job.case.scale * job.case.width
            self.vae.encode(torch.zeros(1, 3, height, width, device=self.device))
        encoded = watch.mark("encode")
        made = job.made("released")
        for index in range(made):
            noise = self.peer.step(index)
        denoised = watch.mark("denoise")
        latents = noise[0] / noise.std()
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        shown = [to_uint8((x.float() / 2 + 0.5).clamp(0, 1).cpu()) for x in pictures]
        watch.mark("decode")
        mask = extract_mask(shown[1]).mask
        watch.mark("masks")
        for name, pixels in (("image", shown[0]), ("anomaly", shown[1]), ("mask", mask)):
            Image.fromarray(pixels).save(out / f"{number}-{name}.png")
        watch.mark("files")
        per_call = denoised / made
        return watch.stages({"denoise": encoded + per_call * job.calls("released")})

    def whole(self, number: int, out: Path) -> float | None:
        return None


class EngineRoad:
    """The engine as users get it, its pairs written into a folder."""

    def __init__(self, job: Job, entry: Entry) -> None:
        self.job, self.device = job, torch.device(job.device)
        backend = entry.peer.removeprefix("engine").removeprefix("-") or "auto"
        self.engine = Engine.from_pretrained(
            job.base,
            adapter=job.adapter,
            device=job.device,
            dtype=entry.dtype,
            backend=backend,
            max_batch=job.case.batch,
        )
        surroundings = Background(job.picture(), noise="fixed") if job.case.background else None
        self.options: dict[str, Any] = {
            "prompts": PROMPTS,
            "background": surroundings,
            "batch": job.case.batch,
            "sampling": self.sampling(),
        }

    def sampling(self) -> Sampling:
        case, made = self.job.case, self.job.made("engine")
        height, width = case.scale * case.height, case.scale * case.width
        size: dict[str, Any] = {"guidance": case.guidance, "height": height, "width": width}
        if case.preset == "released":
            # SD-1.5's own, whatever the base's; it makes one call more than steps
            return Sampling(made - 1, scheduler="PNDMScheduler", skip_prk=True, **size)
        return Sampling(made, preset=case.preset, **size)

    def seeds(self, number: int, batches: int) -> list[int]:
        count = self.job.case.batch * batches
        return [number * count + one for one in range(count)]

    def stages(self, number: int, out: Path) -> dict[str, float]:
        job, watch, ends = self.job, Watch(self.device), []

        def step_end(*_: Any) -> None:
            watch.wait()
            ends.append(time.perf_counter())

        start = time.perf_counter()
        drawn = list(
            self.engine.unfinished(self.seeds(number, 1), callback=step_end, **self.options)
        )
        watch.mark("decode")
        if len(ends) != job.made("engine"):
            raise DualDiffError(
                f"{job.case.batch} pairs did not fit at once: use a smaller --batch"
            )
        pairs = [finish() for finish in drawn]
        watch.mark("masks")
        with FolderWriter(out) as writer:
            for pair in pairs:
                writer.write(pair)
        watch.mark("files")
        # the first call's end tells when it began, if it took as long as the others
        per_call = statistics.median(b - a for a, b in itertools.pairwise(ends))
        told = {
            "text": max(0.0, ends[0] - per_call - start),
            "denoise": per_call * job.calls("engine"),
            "decode": watch.seconds["decode"] - (ends[-1] - start),
        }
        return {stage: s / job.case.batch for stage, s in watch.stages(told).items()}

    def whole(self, number: int, out: Path) -> float | None:
        if self.job.made("engine") < self.job.calls("engine"):
            return None
        start, seeds = time.perf_counter(), self.seeds(number, BATCHES)
        with FolderWriter(out) as writer, Beside(self.job.case.batch) as beside:

            def write(finish: Callable[[], Pair]) -> None:
                writer.write(finish())

            for finish in self.engine.unfinished(seeds, **self.options):
                beside.submit(write, finish)
        return (time.perf_counter() - start) / len(seeds)


class Watch:
    """Seconds of stages, one after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.wait()
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mark(self, stage: str) -> float:
        """End a stage; returns its seconds."""
        self.wait()
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now
        return self.seconds[stage]

    def stages(self, told: dict[str, float]) -> dict[str, float]:
        """All stages; told: those that were reckoned otherwise."""
        return {stage: {**self.seconds, **told}[stage] for stage in STAGES}


def _serve(pipe: Any, job: Job, entry: Entry) -> None:
    if job.device == "cpu":
        keep_freed_blocks()
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        road: Road = (ReleasedRoad if entry.peer == "released" else EngineRoad)(job, entry)
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            out = Path(folder, str(number))
            for part in ("stages", "whole"):
                (out / part).mkdir(parents=True)
            stages = road.stages(2 * number, out / "stages")
            pipe.send((stages, road.whole(2 * number + 1, out / "whole")))


class Traveller:
    """A road in a process of its own; use as a context manager."""

    def __init__(self, job: Job, entry: Entry) -> None:
        context = multiprocessing.get_context("spawn")
        self.entry = entry
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job, entry), daemon=True)
        self.process.start()
        theirs.close()
        self._answer()

    def draw(self, number: int) -> tuple[dict[str, float], float | None]:
        with contextlib.suppress(BrokenPipeError):
            # one that died is reported below
            self.pipe.send(number)
        return self._answer()

    def _answer(self) -> Any:
        return answer_of(self.pipe, self.process, self.entry)

    def __enter__(self) -> Traveller:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.process.terminate()


def timed_calls(case: Case, asked: int | None, *, on_gpu: bool) -> int:
    """How many calls are made of a schedule: all, unless the full network is on a CPU."""
    if asked is not None:
        return asked
    return FEW if case.model == "sd15" and not on_gpu else 1000


def written(case: Case, folder: Path) -> tuple[Path, Path]:
    """The case's base model and adapter as files."""
    if case.model == DEMO:
        fits = (preset for preset in DEMO_PRESETS.values() if preset.background == case.background)
        return BASE, next(fits).adapter
    base = random_base.write_base(folder / "base", case.model, case.seed, full=True)
    weights = RandomWeights.of(case.model, case.seed)
    tensors = adapter_tensors(weights, background=case.background)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "a.safetensors")
    return base, folder / "a.safetensors"


def decode_flops(job: Job) -> int:
    """Of both pictures of a pair, counted on shapes alone."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(job.base / "vae"))
        latents = torch.empty(2, 4, job.case.height, job.case.width)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        vae.decode(latents)
    return int(counter.get_total_flops())


def run(
    case: Case, entries: Sequence[Entry], *, device: str, rounds: int, timed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Draw `rounds` times, A B A B, each peer in its own process. Returns a record."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dualdiff-bench-")))
        say("writing the base model")
        job = Job(case, *written(case, folder), device, timed)
        travellers = {}
        for entry in entries:
            say(f"loading {entry.name}")
            travellers[entry] = stack.enter_context(Traveller(job, entry))
        drawn: dict[Entry, list[Any]] = {entry: [] for entry in entries}
        # the first round fills caches, and what a fixed background's noise makes once
        for number in range(rounds + 1):
            for entry, traveller in travellers.items():
                stages, whole = traveller.draw(number)
                say(f"round {number}/{rounds}  {entry.name}: {sum(stages.values()):.2f} s per pair")
                if number:
                    drawn[entry].append((stages, whole))
    rows = [_row(job, entry, drawn[entry]) for entry in entries]
    return {
        **machine.facts(device),
        "case": asdict(case),
        "rounds": rounds,
        "batches_of_a_run": BATCHES,
        "peers": rows,
    }


def _row(job: Job, entry: Entry, drawn: Sequence[tuple[dict[str, float], float | None]]) -> Any:
    seconds = {stage: statistics.median(one[0][stage] for one in drawn) for stage in STAGES}
    whole = [one[1] for one in drawn if one[1] is not None]
    calls = job.calls(entry.peer)
    flops = measure.flops_of(job.case, entry, job.device) // job.case.batch * calls
    return {
        **asdict(entry),
        "calls": calls,
        "calls_made": job.made(entry.peer),
        "seconds_per_pair": seconds,
        "total_s_per_pair": statistics.median(sum(one[0].values()) for one in drawn),
        "run_s_per_pair": statistics.median(whole) if whole else None,
        "flops_per_pair": flops + decode_flops(job),
    }


def cells(record: dict[str, Any]) -> list[list[str]]:
    """One row of text per peer, in the order of COLUMNS: shares of the stages, then the sum."""
    rows, first = [], record["peers"][0]["total_s_per_pair"]
    for row in record["peers"]:
        total, run_s = row["total_s_per_pair"], row["run_s_per_pair"]
        shares = [f"{row['seconds_per_pair'][stage] / total:.1%}" for stage in STAGES]
        rows.append(
            [
                row["peer"], row["dtype"], str(row["calls"]), *shares, f"{total:.3g}",
                "-" if run_s is None else f"{run_s:.3g}", f"{first / total:.2f}x",
                f"{row['flops_per_pair'] / 1e12:.3g}",
            ]
        )  # fmt: skip
    return rows


def table(record: dict[str, Any]) -> str:
    return markdown_table([COLUMNS, *cells(record)], texts=2)


def headline(record: dict[str, Any]) -> str:
    """What was run, on what, and how much of it was reckoned, in one line."""
    case = record["case"]
    made = {row["calls_made"] for row in record["peers"] if row["calls_made"] < row["calls"]}
    reckoned = f"; of every schedule {max(made)} calls were made, all counted" if made else ""
    background = "with background" if case["background"] else "plain"
    return (
        f"{case['model']}, batches of {case['batch']}, "
        f"{case['scale'] * case['height']}x{case['scale'] * case['width']} px, {background}, "
        f"preset {case['preset'] or 'released'}; {record['device_name']}, {record['cores']} cores, "
        f"{record['instructions']}, torch {record['versions']['torch']}, commit "
        f"{record['commit']}; {record['rounds']} rounds{reckoned}"
    )


LEGEND = """\
Shares of a pair's seconds by stage, one after the other; the sum; a run, in which masks and files
are made beside the next batch (- where not every call was made); speed-up: of the sums, over the
first row. released: one pair at a time in fp32 by its own schedule. TFLOP: denoiser and decoder,
matrix products and convolutions."""
