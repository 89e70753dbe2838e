"""The best launch configuration of every Triton kernel, at the calls of a denoiser step.

A launch asks `tuning.choose` for a configuration by table and shape class. All calls that ask for
the same class are timed with every candidate of the op's module; what takes least in a whole step,
and is as exact as it must be, is what `tuning.write` keeps.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock
from dualdiff_engine.bench.op.bench import check
from dualdiff_engine.bench.op.cases import Problem, Spec, problem, work
from dualdiff_engine.ops.triton import OPS, tuning
from dualdiff_engine.ops.triton.tuning import Config

# (table, shape class, default) -> what to launch with
Pick = Callable[[str, str, Config], Config]
ROUNDS, PATIENCE_S = 9, 0.4
# a smaller gain is noise: the default stays
GAIN = 0.02
# leaves the rest of the machine to the processes that compile
SPARE_CORES = 2


@contextlib.contextmanager
def choosing(pick: Pick) -> Iterator[None]:
    """Launches ask `pick` instead of the shipped tables."""

    def choose(op: str, shape_class: str, default: Config, device: torch.device) -> Config:
        return pick(op, shape_class, default)

    with mock.patch.object(tuning, "choose", choose):
        yield


def candidates(case: Problem) -> list[Config]:
    """What the op's module holds worth measuring for this call; empty if nothing can be chosen."""
    op, arguments = case.spec.op, case.arguments
    module: Any = importlib.import_module(f"dualdiff_engine.ops.triton.{OPS[op]}")
    if not hasattr(module, "candidates"):
        return []
    if op == "attention":
        query, key, _, num_heads = arguments
        return module.candidates(query.shape[-1] // num_heads, query.dtype, key.shape[1])
    if op == "group_norm_silu":
        maps, num_groups = arguments[:2]
        return module.candidates(maps.shape[-2:].numel(), maps.shape[1], num_groups)
    return module.candidates(arguments[0].dtype)


def launch(case: Problem, pick: Pick) -> Tensor:
    with choosing(pick):
        return ops.backend_op("triton", case.spec.op)(*case.arguments)


class _Asked(Exception):  # noqa: N818
    """Ends a launch at its question."""


def asked(case: Problem) -> tuple[str, str, Config] | None:
    """The table and the shape class that a call asks for, and its default; nothing is compiled."""

    def pick(table: str, shape_class: str, default: Config) -> Config:
        raise _Asked(table, shape_class, default)

    try:
        launch(case, pick)
    except _Asked as question:
        return question.args
    return None


@dataclass
class Class:
    """Calls that share a choice, and how often a step makes each."""

    table: str
    name: str
    default: Config
    calls: Counter[Spec] = field(default_factory=Counter)


def classes(calls: Counter[Spec], device: torch.device, dtype: torch.dtype) -> list[Class]:
    """What there is to choose for a step, the largest part of its work first."""
    found: dict[tuple[str, str], Class] = {}
    for spec, count in calls.items():
        answer = asked(problem(spec, device, dtype))
        if answer is not None:
            table, name, default = answer
            found.setdefault((table, name), Class(table, name, default)).calls[spec] += count

    def weight(group: Class) -> float:
        # products at some hundred per byte, as on any tensor core
        counted = ((work(spec, dtype), n) for spec, n in group.calls.items())
        return sum(n * (w.moved + w.flops / 200) for w, n in counted)

    return sorted(found.values(), key=weight, reverse=True)


def compile_all(spec: Spec, device: str, dtype: torch.dtype) -> None:
    """Launch every candidate once, so that its binary is in Triton's cache on disk."""
    with torch.inference_mode():
        case = problem(spec, torch.device(device), dtype)
        for config in candidates(case):
            # what does not compile or fit is found again, and recorded, when it is measured
            with contextlib.suppress(Exception):
                launch(case, lambda *_, config=config: config)


def precompile(groups: list[Class], device: torch.device, dtype: torch.dtype) -> None:
    """Compile in as many processes as there are cores: one would take minutes."""
    cores = max(1, len(os.sched_getaffinity(0)) - SPARE_CORES)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        waiting = [
            pool.submit(compile_all, spec, str(device), dtype)
            for group in groups
            for spec in group.calls
        ]
        for future in waiting:
            future.result()


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
    cases = {spec: problem(spec, device, dtype) for spec in group.calls}
    configs = [group.default]
    for case in cases.values():
        configs += [config for config in candidates(case) if config not in configs]
    configs = configs[: None if most is None else 1 + most]
    tried: list[dict[str, Any]] = [{"config": asdict(c), "status": "ok"} for c in configs]
    step_s = [0.0] * len(configs)
    for spec, case in cases.items():
        runs = {
            str(i): lambda case=case, config=config: launch(case, lambda *_: config)
            for i, config in enumerate(configs)
            if tried[i]["status"] == "ok"
        }
        checked = check(case, runs)
        for name, facts in checked.items():
            tried[int(name)]["status"] = facts["status"]
        if timed:
            green = {name: run for name, run in runs.items() if checked[name]["status"] == "ok"}
            seconds = clock.interleaved(green, device, ROUNDS, PATIENCE_S)
            for name, measured in seconds.items():
                step_s[int(name)] += group.calls[spec] * statistics.median(measured)
    record = {
        "table": group.table,
        "class": group.name,
        "calls": [[spec.op, spec.label, count] for spec, count in group.calls.items()],
        "tried": tried,
    }
    if timed:
        record |= _winner(tried, step_s)
    return record


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
