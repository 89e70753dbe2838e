"""Everything a GPU is asked about this engine, in one command of nine minutes, or in three calls.

`python -m dualdiff_engine.bench.gpu_suite [--call 1|2|3] [--output DIR]`. Call 1 tunes nothing: the
ceilings, checks, every convolution, every op against the libraries. Call 2 tunes where a kernel is
near the best library, then times steps. Call 3: peers, end to end with VAE and files, the ladder.
Each part runs in a process of its own, within its limit, and leaves a JSON record with, if it
fails, what it said; all of them lie in one archive, `gpu-suite.tar.gz`. A part that fails, or is
cut, does not stop the others, but the exit code is 1. `--interpret` runs the same parts with tiny
shapes on a CPU, kernels interpreted: it measures nothing and finds the mistakes that need no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dualdiff_engine.bench.gpu.plan import CALLS, GRACE_S, PARTS, TOTAL_S, of_call, plan
from dualdiff_engine.bench.gpu.summary import summary

RESULTS = Path("bench/results/gpu")
ARCHIVE = "gpu-suite.tar.gz"
# limits are a GPU's: an interpreter on a busy machine may take as many times longer
PATIENCE = 10
# of what a part says on its error stream, the end is kept
SAID = 20_000
MODULE = "dualdiff_engine.bench.gpu.suite"
# (part, folder, seconds, interpreted) -> how it ended
Start = Callable[[str, Path, float, bool], str]


def run_part(name: str, folder: Path, seconds: float, interpreted: bool) -> int:
    """In this process; 1 if anything is wrong."""
    if interpreted:
        # before any kernel is loaded
        import dualdiff_engine.bench.gpu.interpreter  # noqa: F401
    from dualdiff_engine.bench.gpu.parts import RUNS
    from dualdiff_engine.bench.gpu.record import Record, Setting

    setting = Setting(folder, time.monotonic() + seconds, interpreted)
    record = Record(name, setting)
    complaints = record.data.setdefault("complaints", [])
    for complaint in RUNS[name](setting, record):
        print(f"{name}: {complaint}", flush=True)
        complaints.append(complaint)
        record.save()
    record.data["finished"] = True
    record.save()
    return 1 if complaints else 0


def start_part(name: str, folder: Path, seconds: float, interpreted: bool) -> str:
    """In a process of its own, killed with all it started when its time is up -> its status."""
    words = [sys.executable, "-m", MODULE, "--part", name, "--output", str(folder)]
    words += ["--seconds", str(seconds - GRACE_S), *(["--interpret"] if interpreted else [])]
    said = folder / f"{name}.stderr"
    with said.open("wb") as stream:
        process = subprocess.Popen(words, start_new_session=True, stderr=stream)
        try:
            code = process.wait(timeout=seconds)
            status = "ok" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            status = f"cut after {seconds:.0f} s"
        finally:
            # its processes too, whether it ended or not
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    _keep_words(name, folder, status, said.read_text("utf-8", "replace"))
    said.unlink()
    return status


def _keep_words(name: str, folder: Path, status: str, said: str) -> None:
    """The status, and of a part that did not end well its error stream, into its record."""
    path = folder / f"{name}.json"
    record: dict[str, Any] = {"part": name, "notes": []}
    if path.is_file():
        record = json.loads(path.read_text("utf-8"))
    record["status"] = status
    if status != "ok":
        record["stderr"] = said[-SAID:]
        print(said[-SAID:], file=sys.stderr, flush=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def run_all(
    folder: Path,
    parts: Sequence[str],
    seconds: float,
    *,
    interpreted: bool,
    start: Start = start_part,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Part -> how it ended. What is left of the time is planned anew before each part."""
    begin, patience = clock(), PATIENCE if interpreted else 1
    statuses: dict[str, str] = {}
    for number, name in enumerate(parts):
        left = seconds - (clock() - begin) / patience
        given, dropped = plan(parts[number:], left)
        if name in dropped:
            statuses[name] = dropped[name]
            continue
        print(f"[{clock() - begin:3.0f} s] {name}", flush=True)
        statuses[name] = start(name, folder, patience * given[name], interpreted)
    return statuses


def archive(folder: Path, parts: Sequence[str]) -> Path:
    """Every record, and the tuned table, in one file."""
    path = folder / ARCHIVE
    with tarfile.open(path, "w:gz") as file:
        listed = [*(folder / f"{name}.json" for name in parts), *sorted(folder.glob("sm_*.json"))]
        for member in listed:
            if member.is_file():
                file.add(member, member.name)
    return path


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(MODULE, description=__doc__)
    p.add_argument(
        "--output",
        type=Path,
        help=f"folder of the records (default {RESULTS}; with --interpret one that is deleted)",
    )
    p.add_argument("--interpret", action="store_true", help="tiny, on a CPU, nothing is timed")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--call", type=int, choices=CALLS, help="only this one of the three")
    which.add_argument("--part", choices=PARTS, action="append", help="only these, in this order")
    p.add_argument(
        "--limit", type=float, default=TOTAL_S, help=f"seconds for everything (default {TOTAL_S})"
    )
    p.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    with contextlib.ExitStack() as stack:
        if options.output is None:
            options.output = RESULTS
            if options.interpret:
                options.output = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _run(options)


def _run(options: argparse.Namespace) -> None:
    if options.seconds is not None:
        (name,) = options.part
        sys.exit(run_part(name, options.output, options.seconds, options.interpret))
    if options.interpret:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not _has_gpu():
        sys.exit("gpu_suite: PyTorch finds no NVIDIA GPU here; --interpret runs it without one")
    options.output.mkdir(parents=True, exist_ok=True)
    parts = options.part or of_call(options.call)
    statuses = run_all(options.output, parts, options.limit, interpreted=options.interpret)
    print("", *summary(options.output, statuses), sep="\n")
    print(f"records: {archive(options.output, list(statuses))}")
    sys.exit(any(not s.startswith(("ok", "skipped")) for s in statuses.values()))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
