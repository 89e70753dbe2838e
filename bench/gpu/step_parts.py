"""The parts of the GPU suite about whole steps and whole runs."""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock
from dualdiff_engine.bench.gpu.record import Record, Setting
from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op import checks as op_checks
from dualdiff_engine.bench.step import measure, peers, random_base
from dualdiff_engine.bench.step.case import MODELS, Case, adapter_of, network_config
from dualdiff_engine.device import is_out_of_memory
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError
from dualdiff_engine.folder_writer import FolderWriter
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet

STEP = 25
LARGEST = 96
# the first is what the others are compared with in speed
STEP_PEERS = ("engine-triton-graph", "engine-triton", "engine-graph", "engine-reference")
OTHERS = (STEP_PEERS[0], STEP_PEERS[-1], "eager", "xformers", "released")
# of the released coupling
RUNGS = [f"engine-only-{op}" for op in ops.NAMES if op not in ops.COUPLED]
LADDER = (STEP_PEERS[0], STEP_PEERS[-1], *RUNGS)
FIRST_STEP = "dualdiff_engine.bench.gpu.first_step"
# of a ladder, when it is interpreted
FEW = 2
# denoiser calls of two runs end to end: what they differ by is steps, the rest is decoding
SHORT, LONG = 4, 12


def steps(setting: Setting, record: Record) -> Iterator[str]:
    """A denoiser step by the engine's ways to run it, in turn."""
    for batch in setting.batches:
        for background in (False, True):
            if setting.left_s() < 10:
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
    with clock.exact_convolutions():
        exact = peers.PEERS["engine-reference"](case, setting.device, wider).step(STEP)
    built: dict[str, Any] = {
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


def others(setting: Setting, record: Record) -> Iterator[str]:
    """The engine against what else computes the same: a careful port, the released program."""
    yield from step_of(setting, record, setting.case(setting.batches[0], background=False), OTHERS)


def ladder(setting: Setting, record: Record) -> Iterator[str]:
    """What each kernel brings to a step by itself."""
    case = setting.case(setting.batches[0], background=False)
    names = LADDER[: FEW + 2] if setting.interpreted else LADDER
    yield from step_of(setting, record, case, names)


def compiled_peers(setting: Setting, record: Record) -> Iterator[str]:
    """The whole ported network through torch.compile: minutes to compile."""
    if any(available(setting, record, ("compiled",))):
        case = setting.case(setting.batches[0], background=False)
        yield from step_of(setting, record, case, (STEP_PEERS[0], STEP_PEERS[-1], "compiled"))


def end_to_end(setting: Setting, record: Record) -> Iterator[str]:
    """Pairs from noise to files: random weights of SD-1.5's sizes, the VAE and masks included."""
    if importlib.util.find_spec("diffusers") is None:
        record.note("end to end needs diffusers for the VAE: pip install diffusers")
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        full = not setting.interpreted
        dtype = torch.bfloat16 if full else torch.float32
        base = random_base.write_base(
            Path(folder, "base"), setting.model, 0, full=full, dtype=dtype
        )
        with Engine.from_pretrained(
            base, device=setting.device, dtype=setting.dtype, max_batch=setting.batches[0]
        ) as engine:
            adapter = adapter_of(setting.model, 0, background=False)
            engine.keep_adapter(adapter, "bench")
            ready = time.perf_counter() - start
            rows = [
                _run_of(setting, engine, Path(folder, f"out-{number}"), steps)
                # the first run also captures, compiles and allocates
                for number, steps in enumerate((SHORT, SHORT, LONG))
            ]
    pairs = setting.batches[0]
    row: dict[str, Any] = {"pairs": pairs, "graphs": isinstance(engine.denoiser, GraphedDenoiser)}
    if not setting.interpreted:
        row |= _shares(rows[1], rows[2]) | {"ready_s": ready, "first_run_s": rows[0]["run_s"]}
    record.add("runs", [row])
    for found in rows:
        if found["files"] != 3 * pairs:
            yield f"{found['files']} files of {pairs} pairs, expected {3 * pairs}"


def _run_of(setting: Setting, engine: Engine, folder: Path, steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    drawn = engine.generate(range(setting.batches[0]), steps=steps, scheduler="DDIMScheduler")
    clock.synchronize(setting.device)
    run = time.perf_counter() - start
    with FolderWriter(folder) as writer:
        for pair in drawn:
            writer.write(pair)
    written = time.perf_counter() - start - run
    files = len(list(folder.glob("*/*.png")))
    return {"run_s": run, "write_s": written, "files": files}


def _shares(short: Mapping[str, Any], long: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a step, of what is done once (text, decoding, masks), and of the files."""
    step = (long["run_s"] - short["run_s"]) / (LONG - SHORT)
    return {
        "step_s": step,
        "once_s": short["run_s"] - SHORT * step,
        "write_s": statistics.mean((short["write_s"], long["write_s"])),
    }


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
    yield from _first_steps(setting, record)


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


def _first_steps(setting: Setting, record: Record) -> Iterator[str]:
    """Processes of their own, whose compiled kernels are in the cache on disk by now."""
    words = [sys.executable, "-m", FIRST_STEP, *(["--interpret"] if setting.interpreted else [])]
    try:
        run = subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=max(1.0, setting.left_s())
        )
    except subprocess.TimeoutExpired:
        record.note("first step: no time")
    except subprocess.CalledProcessError as error:
        record.add("first_steps", [{"stderr": error.stderr}])
        yield f"first step: exit {error.returncode}: {error.stderr.strip().splitlines()[-1:]}"
    else:
        found = {} if setting.interpreted else json.loads(run.stdout.splitlines()[-1])
        record.add("first_steps", [{"cache": "filled", **found}])


RUNS: dict[str, Callable[[Setting, Record], Iterator[str]]] = {
    "steps": steps,
    "peers": others,
    "end_to_end": end_to_end,
    "ladder": ladder,
    "footprint": footprint,
    "compiled": compiled_peers,
}
