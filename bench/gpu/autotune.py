"""The best launch configuration of every Triton kernel, at the calls of a denoiser step.

A launch asks `tuning.choose` for a configuration by table and shape class. All calls that ask for
the same class are timed with every candidate of the op's module; what takes least in a whole step,
and is as exact as it must be, is what `tuning.write` keeps. Kernels are compiled beforehand, on
every core, from calls of few rows.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock
from dualdiff_engine.bench.gpu import launches
from dualdiff_engine.bench.gpu.launches import Pick, asked, candidates, choosing
from dualdiff_engine.bench.op.bench import PLAIN, check, reason
from dualdiff_engine.bench.op.calls import Spec, few_rows, work
from dualdiff_engine.bench.op.cases import Problem, problem
from dualdiff_engine.ops.triton import interpreted
from dualdiff_engine.ops.triton.tuning import Config

ROUNDS, PATIENCE_S = 9, 0.4
# a smaller gain is noise: the default stays
GAIN = 0.02
# a kernel that a library beats by more is not worth tuning: the library is what is chosen
NEAR = 1.3
# leaves the rest of the machine to the process that waits
SPARE_CORES = 2


def cores() -> int:
    """That compile."""
    return max(1, len(os.sched_getaffinity(0)) - SPARE_CORES)


def launch(case: Problem, pick: Pick) -> Tensor:
    with choosing(pick):
        return ops.backend_op("triton", case.spec.op)(*case.arguments)


@dataclass
class Class:
    """Calls that share a choice, and how often a step makes each."""

    table: str
    name: str
    default: Config
    calls: Counter[Spec] = field(default_factory=Counter)


def classes(calls: Counter[Spec], dtype: torch.dtype) -> list[Class]:
    """What there is to choose for a step, the largest part of its work first."""
    found: dict[tuple[str, str], Class] = {}
    for spec, count in calls.items():
        answer = asked(spec, dtype)
        if answer is not None:
            table, name, default = answer
            found.setdefault((table, name), Class(table, name, default)).calls[spec] += count

    def weight(group: Class) -> float:
        # products at some hundred per byte, as on any tensor core
        counted = ((work(spec, dtype), n) for spec, n in group.calls.items())
        return sum(n * (w.moved + w.flops / 200) for w, n in counted)

    return sorted(found.values(), key=weight, reverse=True)


def configurations(group: Class, dtype: torch.dtype) -> list[Config]:
    """The default of a class, and its candidates."""
    configs = [group.default]
    for spec in group.calls:
        configs += [config for config in candidates(spec, dtype) if config not in configs]
    return configs


@dataclass(frozen=True)
class Job:
    """One launch to compile for; config: None where there is no choice."""

    spec: Spec
    dtype: torch.dtype
    config: Config | None

    def kernels(self) -> frozenset[Hashable]:
        """What it compiles, equal for equal kernels."""
        if interpreted():
            return frozenset([(self.spec, self.dtype, str(self.config))])
        found = launches.compilations(self.spec, self.dtype, self.config)
        return frozenset(map(launches.key, found))


def default_jobs(calls: Iterable[Spec], dtype: torch.dtype) -> list[Job]:
    """What the calls compile without tuning."""
    found = []
    for spec in calls:
        question = asked(spec, dtype)
        found.append(Job(few_rows(spec), dtype, question[-1] if question else None))
    return found


def tuning_jobs(group: Class, dtype: torch.dtype) -> list[Job]:
    """What trying every configuration of a class compiles."""
    configs = configurations(group, dtype)
    return [Job(few_rows(spec), dtype, config) for spec in group.calls for config in configs]


def distinct(jobs: Iterable[Job], seen: set[Hashable] | None = None) -> list[tuple[Job, int]]:
    """Those that compile something that none before them does, and how many kernels that is.

    seen: what was compiled before the first; gains what these compile.
    """
    found = []
    seen = set() if seen is None else seen
    for job in jobs:
        new = job.kernels() - seen
        if new:
            found.append((job, len(new)))
            seen |= new
    return found


def compile_job(job: Job, device: str) -> str | None:
    """Launch it, so that its binary is in Triton's cache on disk; what went wrong, if anything."""
    if interpreted():
        import dualdiff_engine.bench.gpu.interpreter  # noqa: F401
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            case = problem(job.spec, torch.device(device), job.dtype)
            launch(case, lambda table, name, default: job.config or default)
    # whatever it is, it is met again, and recorded, where the kernel is checked or timed
    except Exception as error:
        return reason(error)
    return None


def _compile(given: tuple[Job, str]) -> str | None:
    return compile_job(*given)


def precompile(jobs: Sequence[Job], device: torch.device, deadline: float) -> dict[str, Any]:
    """Compile on every core until a deadline on `time.monotonic`; what was done, and what failed.

    The processes are ended with what they are at when the time is up.
    """
    start, failed, done = time.monotonic(), [], 0
    context = multiprocessing.get_context("spawn")
    processes = min(cores(), len(jobs)) or 1
    with context.Pool(processes) as pool:
        results = pool.imap_unordered(_compile, [(job, str(device)) for job in jobs])
        for _ in jobs:
            try:
                error = results.next(timeout=max(0.1, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            done += 1
            failed += [error] if error else []
    took = {} if interpreted() else {"seconds": time.monotonic() - start}
    return {"jobs": len(jobs), "done": done, "processes": processes, "failed": failed, **took}


def standing(group: Class, rows: Iterable[Mapping[str, Any]]) -> tuple[float, str] | None:
    """(time of the default kernel over that of the best library, its name) in a step's calls.

    rows: of `op.bench`. None where a call is not among them, or no library serves it.
    """
    by_call: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            by_call.setdefault((row["op"], row["shapes"]), {})[row["by"]] = row["ms"]["p50"]
    ours, theirs, names = 0.0, 0.0, Counter[str]()
    for spec, count in group.calls.items():
        ms = by_call.get((spec.op, spec.label), {})
        libraries = {by: x for by, x in ms.items() if by not in ("triton", PLAIN)}
        if "triton" not in ms or not libraries:
            return None
        best = min(libraries, key=lambda by: libraries[by])
        ours, theirs = ours + count * ms["triton"], theirs + count * libraries[best]
        names[best] += count
    return ours / theirs, names.most_common(1)[0][0]


def tune(
    group: Class,
    device: torch.device,
    dtype: torch.dtype,
    *,
    timed: bool,
    most: int | None = None,
) -> dict[str, Any]:
    """Try the default and candidates, `most` of them, on every call of a class.

    The record holds all that was tried, and when timed the winner.
    """
    configs = configurations(group, dtype)[: None if most is None else 1 + most]
    tried: list[dict[str, Any]] = [{"config": asdict(c), "status": "ok"} for c in configs]
    step_s = [0.0] * len(configs)
    for spec, count in group.calls.items():
        try:
            taken = _try(problem(spec, device, dtype), configs, tried, timed=timed)
        # a call whose inputs do not fit says so for all that was to be tried on it
        except (RuntimeError, MemoryError) as error:
            for facts in tried:
                facts["status"] = f"does not run: {reason(error)}"
            break
        step_s = [x + count * seconds for x, seconds in zip(step_s, taken, strict=True)]
    record = {
        "table": group.table,
        "class": group.name,
        "calls": [[spec.op, spec.label, count] for spec, count in group.calls.items()],
        "tried": tried,
    }
    if timed:
        record |= _winner(tried, step_s)
    return record


def _try(
    case: Problem, configs: Sequence[Config], tried: list[dict[str, Any]], *, timed: bool
) -> list[float]:
    """Check, and time, what is still green; the seconds of each configuration."""
    runs = {
        str(i): lambda config=config: launch(case, lambda *_: config)
        for i, config in enumerate(configs)
        if tried[i]["status"] == "ok"
    }
    checked = check(case, runs)
    for name, facts in checked.items():
        tried[int(name)]["status"] = facts["status"]
    taken = [0.0] * len(configs)
    if timed:
        device = case.arguments[0].device
        green = {name: run for name, run in runs.items() if checked[name]["status"] == "ok"}
        for name, seconds in clock.interleaved(green, device, ROUNDS, PATIENCE_S).items():
            taken[int(name)] = statistics.median(seconds)
    return taken


def _winner(tried: list[dict[str, Any]], step_s: list[float]) -> dict[str, Any]:
    """The fastest of the green ones; the default, which is first, unless it is clearly beaten."""
    for facts, seconds in zip(tried, step_s, strict=True):
        if facts["status"] == "ok":
            facts["ms_per_step"] = seconds * 1e3
    green = [i for i, facts in enumerate(tried) if facts["status"] == "ok"]
    if not green:
        return {"winner": None}
    best = min(green, key=lambda i: step_s[i])
    if 0 in green and step_s[best] > (1 - GAIN) * step_s[0]:
        best = 0
    ratio = step_s[0] / step_s[best] if 0 in green else None
    return {"winner": tried[best]["config"], "speedup_over_default": ratio}


def tables(records: list[dict[str, Any]]) -> dict[str, dict[str, Config]]:
    """For `tuning.write`."""
    rows: dict[str, dict[str, Config]] = {}
    for record in records:
        if record.get("winner") is not None:
            rows.setdefault(record["table"], {})[record["class"]] = Config(**record["winner"])
    return rows
