"""Run a case: peers interleaved, medians, errors, FLOPs, and the machine's own rate."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.step import exported
from dualdiff_engine.bench.step.case import WHY, Case
from dualdiff_engine.bench.step.peers import META, PEERS, Exported, folds
from dualdiff_engine.bench.step.workers import Entry, Worker
from dualdiff_engine.ops import bind

PRODUCT = 2048
WARM_UP = 2
Say = Callable[[str], None]


def count_flops(case: Case, peer: str, *, folds: bool = False) -> int:
    """FLOPs of one step of a peer, counted on shapes alone (matrix products, convolutions).

    folds: whether its doublings are folded, as `peers.folds` says.
    """
    with torch.inference_mode():
        given = {"folds": True} if folds else {}
        built = PEERS[peer](case, META, torch.float32, **given)
        if case.background:
            # what is computed once per timestep, for all batches, is not part of a step
            built.step(0)
        with FlopCounterMode(display=False) as counter:
            built.step(0)
    return int(counter.get_total_flops())


def flops_of(case: Case, entry: Entry, device: str) -> int:
    """FLOPs of one step of an entry as it runs on a device."""
    folded = folds(entry.peer, torch.device(device), getattr(torch, entry.dtype))
    return count_flops(case, entry.peer, folds=folded)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one square matrix product, the faster of PyTorch's and the engine's."""
    x = torch.randn(PRODUCT, PRODUCT, device=device).to(dtype)
    bound = bind("auto", device=device, dtype=dtype).linear

    def seconds(product: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.inference_mode():
        best = min(seconds(p) for p in (lambda: x @ x, lambda: bound(x, x)) for _ in range(3))
    return 2 * PRODUCT**3 / best


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """p20, p50, p80 in milliseconds."""
    points = np.quantile(np.array(seconds) * 1e3, (0.2, 0.5, 0.8))
    return dict(zip(("p20", "p50", "p80"), (float(p) for p in points), strict=True))


def relative_error(candidate: np.ndarray, reference: np.ndarray) -> float:
    difference = candidate.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def prepare(
    case: Case, entries: Sequence[Entry], stack: contextlib.ExitStack, say: Say
) -> tuple[dict[Entry, Path], dict[Entry, dict[str, float]]]:
    """Exports for the peers that run one: (folders, seconds by part), kept as long as `stack`."""
    folders, seconds = {}, {}
    for entry in entries:
        built = PEERS[entry.peer]
        if issubclass(built, Exported):
            say(f"exporting for {entry.name}")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dualdiff-bench-"))
            folders[entry] = Path(folder)
            seconds[entry] = exported.prepare(case, entry.dtype, built.backend, Path(folder))
    return folders, seconds


def run(
    case: Case, entries: Sequence[Entry], *, device: str, rounds: int, say: Say
) -> dict[str, Any]:
    """Time every entry `rounds` times, A B A B, each in its own process. Returns a record."""
    index = case.steps // 2
    seconds: dict[Entry, list[float]] = {entry: [] for entry in entries}
    noises: dict[Entry, np.ndarray] = {}
    peaks: dict[Entry, int] = {}
    rates: dict[str, list[float]] = {entry.dtype: [] for entry in entries}
    with contextlib.ExitStack() as stack:
        folders, prepared = prepare(case, entries, stack, say)
        workers: dict[Entry, Worker] = {}
        for entry in entries:
            say(f"loading {entry.name}")
            worker = Worker(case, entry, device, folders.get(entry))
            workers[entry] = stack.enter_context(worker)
            # the first step also fills what fixed noise computes once; pages settle by the last
            for _ in range(WARM_UP):
                _, _, noises[entry] = worker.step(index)
        for number in range(rounds):
            for entry, worker in workers.items():
                took, peaks[entry], _ = worker.step(index)
                seconds[entry].append(took)
                say(f"round {number + 1}/{rounds}  {entry.name}: {took * 1e3:.0f} ms")
            for dtype, measured in rates.items():
                measured.append(product_rate(torch.device(device), getattr(torch, dtype)))
        loads = {entry: worker.loaded for entry, worker in workers.items()}
    best = {dtype: max(measured) for dtype, measured in rates.items()}
    reference = next((e for e in entries if e.peer == "released"), None)
    rows = [
        {
            **asdict(entry),
            **speed(case, entry, device, seconds[entry], best[entry.dtype]),
            "peak_bytes": peaks[entry],
            "load_s": loads[entry]["load_s"],
            "load_peak_bytes": loads[entry]["load_peak"],
            "prepared_s": prepared.get(entry, {}),
            "speedup_over_released": reference
            and statistics.median(
                r / s for r, s in zip(seconds[reference], seconds[entry], strict=True)
            ),
            "error_to_released": reference and relative_error(noises[entry], noises[reference]),
        }
        for entry in entries
    ]
    return {
        **machine.facts(device),
        "case": asdict(case),
        "why": WHY[case.model],
        "product_flops_per_s": best,
        "peers": rows,
    }


def speed(
    case: Case, entry: Entry, device: str, seconds: Sequence[float], rate: float
) -> dict[str, Any]:
    """The part of a row that follows from its times. rate: FLOP/s of products in its dtype."""
    flops, middle = flops_of(case, entry, device), statistics.median(seconds)
    return {
        "ms_per_step": quantiles(seconds),
        "steps_timed": len(seconds),
        "pairs_per_s": case.batch / (case.steps * middle),
        "flops_per_step": flops,
        "flops_per_s": flops / middle,
        "share_of_product_rate": flops / middle / rate,
    }
