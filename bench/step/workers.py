"""Peers in processes of their own, so that each has its own allocator and its own peak memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualdiff_engine.bench.step.case import Case
from dualdiff_engine.bench.step.peers import PEERS
from dualdiff_engine.device import keep_freed_blocks, release_freed_blocks
from dualdiff_engine.errors import DualDiffError


@dataclass(frozen=True)
class Entry:
    """One row of a benchmark: a peer in a dtype."""

    peer: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.peer} {self.dtype}"


def peak_bytes(device: torch.device) -> int:
    """Peak memory since the last `reset_peak`: of the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text("ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # proc(5): 5 resets the peak resident set size
        Path("/proc/self/clear_refs").write_text("5", "ascii")
    except OSError:
        return


def _serve(
    pipe: Connection, case: Case, entry: Entry, device_name: str, folder: Path | None
) -> None:
    device = torch.device(device_name)
    if device.type == "cpu":
        # for every peer: on virtual machines fresh pages can cost more than the arithmetic, and
        # whether they do depends on the host of the hour
        keep_freed_blocks()
    with torch.inference_mode():
        start = time.perf_counter()
        # what was exported for a peer, for those that run an export
        given = {} if folder is None else {"folder": folder}
        peer = PEERS[entry.peer](case, device, getattr(torch, entry.dtype), **given)
        release_freed_blocks()
        pipe.send({"load_s": time.perf_counter() - start, "load_peak": peak_bytes(device)})
        reset_peak(device)
        while (index := pipe.recv()) is not None:
            start = time.perf_counter()
            noise = peer.step(index)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
            pipe.send(
                {"seconds": seconds, "peak": peak_bytes(device), "noise": noise.cpu().numpy()}
            )


def answer_of(pipe: Connection, process: BaseProcess, entry: Entry) -> Any:
    """What a peer's process sends next. Raises DualDiffError when it died."""
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join()
        raise DualDiffError(
            f"benchmark peer {entry.name} died (exit {process.exitcode}); "
            "out of memory is the usual reason: use a smaller --batch"
        ) from error


class Worker:
    """A peer in a process; use as a context manager.

    folder: by `exported.prepare`, for a peer that runs an export.
    """

    def __init__(self, case: Case, entry: Entry, device: str, folder: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self.entry = entry
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, case, entry, device, folder), daemon=True
        )
        self.process.start()
        theirs.close()
        self.loaded = self._answer()

    def step(self, index: int) -> tuple[float, int, np.ndarray]:
        """(seconds, peak bytes so far, guided noise)."""
        with contextlib.suppress(BrokenPipeError):
            # a worker that died is reported below
            self.pipe.send(index)
        answer = self._answer()
        return answer["seconds"], answer["peak"], answer["noise"]

    def _answer(self) -> dict[str, Any]:
        return answer_of(self.pipe, self.process, self.entry)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(None)
        self.process.join(timeout=10)
        self.process.terminate()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
