"""The parts of the GPU suite, each a function that fills a record and names what is wrong."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock
from dualdiff_engine.bench.gpu import autotune
from dualdiff_engine.bench.machine import facts as machine_facts
from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op import checks as op_checks
from dualdiff_engine.bench.op.cases import Spec, trace, work
from dualdiff_engine.bench.step import measure, peers
from dualdiff_engine.bench.step.case import MODELS, Case, network_config
from dualdiff_engine.device import is_out_of_memory
from dualdiff_engine.errors import BackendError
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops.triton import tuning

STEP = 25
LARGEST = 96
# the first is what the others are compared with in speed
STEP_PEERS = ("engine-triton-graph", "engine-triton", "engine-reference", "eager", "released")
LADDER = (STEP_PEERS[0], "engine-reference", *(f"engine-only-{op}" for op in ops.NAMES))
FIRST_STEP = "dualdiff_engine.bench.gpu.first_step"
# candidates of a class that are tried when they are interpreted
FEW = 2


@dataclass(frozen=True)
class Setting:
    """What the parts run on. deadline: of this process's part, on `time.monotonic`."""

    folder: Path
    deadline: float
    interpreted: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.interpreted else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.interpreted else torch.bfloat16

    @property
    def model(self) -> str:
        return "tiny" if self.interpreted else "sd15"

    @property
    def batches(self) -> tuple[int, ...]:
        """Pairs per step; the first is what the kernels are tuned for."""
        return (1,) if self.interpreted else (32, 1)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, batch: int, *, background: bool) -> Case:
        size = MODELS[self.model]["sample_size"]
        return Case(self.model, batch, 50, size, size, 2.5, background, 0)


class Record:
    """A JSON file that is whole after every addition, so that a cut run leaves what it had."""

    def __init__(self, part: str, setting: Setting) -> None:
        self.path = setting.folder / f"{part}.json"
        self.data: dict[str, Any] = {
            "part": part,
            "interpreted": setting.interpreted,
            **machine_facts(setting.device),
            "notes": [],
        }

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.data["notes"].append(text)
        self.save()

    def add(self, kind: str, rows: list[dict[str, Any]]) -> None:
        self.data.setdefault(kind, []).extend(rows)
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")


def machine(setting: Setting, record: Record) -> Iterator[str]:
    """The device and its ceilings."""
    if not setting.interpreted:
        for dtype in (torch.bfloat16, torch.float32):
            found = asdict(clock.ceilings(setting.device, dtype))
            record.add("ceilings", [{"dtype": str(dtype).removeprefix("torch."), **found}])
    record.save()
    yield from ()


def checks(setting: Setting, record: Record) -> Iterator[str]:
    """Every kernel, and the network made of them."""
    device, interpreted = setting.device, setting.interpreted
    network = "tiny" if interpreted else "small"

    def rows() -> Iterator[dict[str, Any]]:
        yield from op_checks.operators(device, interpreted=interpreted)
        with torch.inference_mode():
            yield from op_checks.graphs(network, device, setting.dtype)
            # every dtype is interpreted by the tests of the kernels
            dtypes = (torch.float32,) if interpreted else op_checks.DTYPES
            yield from op_checks.accuracy(setting.model, device, dtypes)
            yield from op_checks.network(network, device, dtypes)

    for row in rows():
        record.add("checks", [row])
        if row["status"] != "ok" and not row["status"].startswith("not here"):
            yield f"{row['op']} {row['check']} {row['dtype']} {row['shapes']}: {row['status']}"


def tune(setting: Setting, record: Record) -> Iterator[str]:
    """Launch configurations for every call of a step, of large batches and of one pair."""
    calls: Counter[Spec] = Counter()
    for batch in setting.batches:
        for background in (False, True):
            calls |= trace(setting.model, batch, background=background)
    device, dtype, timed = setting.device, setting.dtype, not setting.interpreted
    with torch.inference_mode():
        groups = autotune.classes(calls, device, dtype)
        if timed:
            autotune.precompile(groups, device, dtype)
        for number, group in enumerate(groups):
            if setting.left_s() < 10:
                record.note(f"{len(groups) - number} of {len(groups)} classes not tuned: no time")
                break
            most = FEW if setting.interpreted else None
            found = autotune.tune(group, device, dtype, timed=timed, most=most)
            record.add("classes", [found])
            if found["tried"][0]["status"] != "ok":
                yield f"default of {group.table} {group.name}: {found['tried'][0]['status']}"
            if timed:
                capability = torch.cuda.get_device_capability(device)
                path = tuning.write(capability, autotune.tables(record.data["classes"]))
                # beside the records, for machines that keep nothing else
                (setting.folder / path.name).write_bytes(path.read_bytes())


def op_table(setting: Setting, record: Record) -> Iterator[str]:
    """Every op call of a large batch's step on every backend; compiled, the largest of each op."""
    calls = trace(setting.model, setting.batches[0])
    red: list[str] = []

    def each(rows: list[dict[str, Any]]) -> None:
        record.add("rows", rows)
        red.extend(
            f"{row['op']} {row['shapes']} by {row['by']}: {row['status']}"
            for row in rows
            if row["by"] in ops.BACKENDS and row["status"] != "ok"
        )

    found = op_bench.run(
        calls, setting.device, setting.dtype, timed=not setting.interpreted, each=each
    )
    record.data["ceilings"] = found["ceilings"]
    record.save()
    if not setting.interpreted:
        _compiled(setting, record, calls)
    yield from red


def _compiled(setting: Setting, record: Record, calls: Counter[Spec]) -> None:
    """torch.compile of the plain formula takes long: the call with most work of each op."""
    ceilings = clock.Ceilings(**record.data["ceilings"])

    def load(spec: Spec) -> float:
        counted = work(spec, setting.dtype)
        return calls[spec] * ceilings.floor_s(counted.flops, counted.moved)[0]

    with torch.inference_mode():
        for op in ops.NAMES:
            if setting.left_s() < 20:
                record.note(f"{op} and what follows not compiled: no time")
                return
            spec = max((s for s in calls if s.op == op), key=load)
            rows = op_bench.rows_of(
                spec, calls[spec], setting.device, setting.dtype, ceilings, compile=True
            )
            record.add("compiled", rows)


def steps(setting: Setting, record: Record) -> Iterator[str]:
    """End to end: a denoiser step by the engine and by its peers, in turn."""
    for batch in setting.batches:
        for background in (False, True):
            if setting.left_s() < 15:
                record.note(f"batch {batch}, background {background}: no time")
                continue
            case = setting.case(batch, background=background)
            yield from step_of(setting, record, case, STEP_PEERS)
            if not setting.interpreted:
                torch.cuda.empty_cache()


def available(
    setting: Setting, record: Record, names: tuple[str, ...]
) -> Iterator[tuple[str, torch.dtype]]:
    """Those that can run here, each with its dtype; the record says why others cannot."""
    for name in names:
        dtype = torch.float32 if name == "released" else setting.dtype
        try:
            peers.require(name, setting.device, dtype)
        except BackendError as error:
            record.note(str(error))
            continue
        if setting.interpreted and name in ("eager", "released"):
            # not what this machine is asked about
            continue
        yield name, dtype


@torch.inference_mode()
def step_of(setting: Setting, record: Record, case: Case, names: tuple[str, ...]) -> Iterator[str]:
    """One case: noise of each peer against a wider dtype, and unless interpreted its time."""
    wider = torch.float64 if setting.dtype == torch.float32 else torch.float32
    exact = peers.PEERS["engine-reference"](case, setting.device, wider).step(STEP)
    built = {
        name: peers.PEERS[name](case, setting.device, dtype)
        for name, dtype in available(setting, record, names)
    }
    error = {name: op_bench.relative(p.step(STEP), exact.double()) for name, p in built.items()}
    rows = [
        {
            "peer": name,
            **asdict(case),
            "backends": {row.op: row.backend for row in p.ops.table} if "engine" in name else None,
            "error_to_wider_reference": error[name],
        }
        for name, p in built.items()
    ]
    if not setting.interpreted:
        _timed(setting, case, built, rows)
    record.add("steps", rows)
    # both round in this dtype; neither order of sums is the better one
    budget = op_checks.ROOM * error["engine-reference"]
    for name in error:
        if name.startswith("engine") and not error[name] <= budget:
            yield f"{name} at batch {case.batch}: error {error[name]:.1e}, may be {budget:.1e}"


def _timed(
    setting: Setting, case: Case, built: Mapping[str, Any], rows: list[dict[str, Any]]
) -> None:
    work_of = {name: partial(peer.step, STEP) for name, peer in built.items()}
    patience = min(15.0, setting.left_s() / 3)
    seconds = clock.interleaved(work_of, setting.device, rounds=15, patience_s=patience, warm_up=2)
    flops = measure.count_flops(case, "engine")
    for row in rows:
        measured = seconds[row["peer"]]
        middle = statistics.median(measured)
        row["ms_per_step"] = measure.quantiles(measured)
        row["rounds"] = len(measured)
        row["pairs_per_s"] = case.batch / (case.steps * middle)
        if row["peer"].startswith("engine"):
            row["flops_per_s"] = flops / middle
        first = seconds[next(iter(built))]
        ratios = (s / f for s, f in zip(measured, first, strict=True))
        row["times_first"] = statistics.median(ratios)


def ladder(setting: Setting, record: Record) -> Iterator[str]:
    """What each kernel brings to a step by itself."""
    case = setting.case(setting.batches[0], background=False)
    names = LADDER[: FEW + 2] if setting.interpreted else LADDER
    yield from step_of(setting, record, case, names)


def random_network(setting: Setting) -> DualUNet:
    """The engine's network with weights drawn on the device: what they are does not matter here."""
    bound = ops.bind(op_checks.BACKEND, device=setting.device, dtype=setting.dtype)
    unet = DualUNet(network_config(setting.model), bound, background=True)
    unet.load({name: drawn(x, setting) for name, x in unet.state_dict().items()})
    return unet


def drawn(like: Tensor, setting: Setting) -> Tensor:
    scale = max(1, like.numel() // len(like)) ** -0.5
    x = scale * torch.randn(like.shape, device=setting.device)
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(setting.dtype, memory_format=layout)


def call_inputs(unet: DualUNet, setting: Setting, batch: int) -> tuple[Any, ...]:
    """latents, time_bias, text of a step."""
    size, device = MODELS[setting.model]["sample_size"], setting.device
    context = torch.randn(2, 2, 77, unet.config.context_width, device=device).to(setting.dtype)
    bias = unet.time_inputs(torch.tensor([500.0], device=device))[0]
    latents = torch.randn(2, 1, batch, 4, size, size, device=device)
    return latents, bias, unet.text_inputs(context)


@torch.inference_mode()
def footprint(setting: Setting, record: Record) -> Iterator[str]:
    """Peak memory up to a large batch, the switch of adapters, the time to a first step."""
    unet = random_network(setting)
    for batch in (*setting.batches, 2 if setting.interpreted else LARGEST):
        row: dict[str, Any] = {"batch": batch, "fits": True}
        try:
            if not setting.interpreted:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(setting.device)
            unet(*call_inputs(unet, setting, batch))
            if not setting.interpreted:
                row["peak_bytes"] = torch.cuda.max_memory_allocated(setting.device)
                row["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(setting.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            row["fits"] = False
            yield f"a batch of {batch} pairs does not fit"
        record.add("batches", [row])
    yield from _switches(setting, record, unet)
    _first_steps(setting, record)


def _switches(setting: Setting, record: Record, unet: DualUNet) -> Iterator[str]:
    """Adapters into a captured network, from the device and from pinned memory."""
    graphed = GraphedDenoiser(unet, (lambda run: run) if setting.interpreted else None)
    inputs = call_inputs(unet, setting, 1)
    graphed(*inputs)
    sets = [{name: drawn(x, setting) for name, x in unet.named_buffers()} for _ in range(2)]
    sources = {"device": sets[0], "other": sets[1]}
    if not setting.interpreted:
        sources["pinned host"] = {name: x.cpu().pin_memory() for name, x in sets[0].items()}
    # the copies must be what the network computes with
    noises = []
    for tensors in (sets[0], sets[1], sets[0]):
        graphed.load(tensors)
        noises.append(graphed(*inputs))
    if not torch.equal(noises[0], noises[2]) or torch.equal(noises[0], noises[1]):
        yield "a switch of adapters and back does not give the same noise"
    row: dict[str, Any] = {"bytes": sum(x.nbytes for x in sets[0].values())}
    if not setting.interpreted:
        switch = {name: partial(graphed.load, tensors) for name, tensors in sources.items()}
        seconds = clock.interleaved(switch, setting.device)
        row |= {f"ms from {name}": measure.quantiles(s) for name, s in seconds.items()}
    record.add("switches", [row])


def _first_steps(setting: Setting, record: Record) -> None:
    """Processes of their own, the first with an empty cache of compiled kernels."""
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "cached"):
            words = ["--interpret"] if setting.interpreted else []
            run = subprocess.run(
                [sys.executable, "-m", FIRST_STEP, cache, *words],
                capture_output=True,
                text=True,
                check=True,
            )
            found = {} if setting.interpreted else json.loads(run.stdout.splitlines()[-1])
            record.add("first_steps", [{"cache": state, **found}])


def compiled_peers(setting: Setting, record: Record) -> Iterator[str]:
    """The whole ported network through torch.compile, and by xformers: minutes to compile."""
    names = [name for name, _ in available(setting, record, ("xformers", "compiled"))]
    if names:
        case = setting.case(setting.batches[0], background=False)
        yield from step_of(setting, record, case, (STEP_PEERS[0], "engine-reference", *names))


@dataclass(frozen=True)
class Part:
    """run yields what is wrong; seconds it needs at least to be started, and may take at most."""

    run: Callable[[Setting, Record], Iterator[str]]
    least: int
    most: int


PARTS = {
    "machine": Part(machine, 15, 30),
    "checks": Part(checks, 40, 110),
    "autotune": Part(tune, 60, 110),
    "ops": Part(op_table, 40, 100),
    "steps": Part(steps, 40, 110),
    "footprint": Part(footprint, 50, 90),
    "ladder": Part(ladder, 40, 60),
    "compiled": Part(compiled_peers, 120, 240),
}
