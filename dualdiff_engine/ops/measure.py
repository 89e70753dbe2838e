"""Time the backends of an op call against each other, on this device, each proved before.

A call is known by its shape class: its shapes at one pair, in the model's own size, as a word that
a recipe can hold. It is timed at the shapes of the batch that it will run with.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.ops import choice, proof

Shapes = tuple[Any, ...]

# of each candidate, in turn: A B A B …
ROUNDS = {"cpu": 5, "cuda": 15}
# short calls are timed more often: until each candidate has run this long, or so often
LEAST_S, MOST_ROUNDS = 0.02, 50
# over all calls: what slows a machine for a second slows every candidate of a call, or one
PASSES = 2
# the usual choice stays unless another is this much faster: a tie must not flip between runs
GAIN = 0.97
# rows that a proof keeps of a call: more than a vector, a block's edge among them
ROWS, KEYS = 33, 130
PRODUCTS = ("linear", "branch_linear", "geglu", "exchange", "merge")


@dataclass(frozen=True)
class OpCall:
    """A call that the network makes: its op, its class, and its shapes at the batch to come."""

    op: str
    shape_class: str
    shapes: Shapes

    @property
    def name(self) -> str:
        """As in a recipe: "attention@2x256x77x2x32"."""
        return f"{self.op}@{self.shape_class}"


def shape_class(op: str, shapes: Shapes) -> str:
    """A word for the shapes of a call's arguments, as in `proof.PROBLEMS`."""
    first, second = shapes[0], shapes[1]
    facts: list[Any] = list(first)
    if op in ("linear", "branch_linear", "geglu"):
        facts += [second[-2]]
        # a residual, or the background
        facts += ["more"] if any(x is not None for x in shapes[3:]) else []
    elif op in ("attention", "align"):
        facts += [second[1], shapes[3]]
        # rows that share a source; a second source, or a graphic
        facts += [f"of{second[0]}"] if op == "attention" and second[0] != first[0] else []
        extra = shapes[4:5] if op == "attention" else shapes[7:8]
        facts += ["more"] if any(x is not None for x in extra) else []
    elif op == "group_norm_silu":
        facts += [second]
    return "x".join(map(str, facts))


def reduced(op: str, shapes: Shapes) -> Shapes:
    """The same widths with few rows: what a proof solves for a call of the network."""
    s = list(shapes)
    if op in ("linear", "geglu"):
        rows = (min(ROWS, math.prod(s[0][:-1])),)
        s[0] = (*rows, s[0][-1])
        if len(s) > 3 and s[3] is not None:
            s[3] = (*rows, s[3][-1])
    elif op == "branch_linear" and len(s) > 3 and s[3] is not None:
        groups, positions, width = s[3]
        positions = min(ROWS, positions)
        s[0] = (s[0][0], groups * positions, s[0][-1])
        s[3] = (groups, positions, width)
    elif op == "branch_linear":
        s[0] = (s[0][0], min(ROWS, math.prod(s[0][1:-1])), s[0][-1])
    elif op == "attention":
        # every source has one row, and the queries that share it follow
        s[0] = (s[0][0] // s[1][0], min(ROWS, s[0][1]), s[0][2])
        s[1], s[2], *more = ((1, min(KEYS, x[1]), x[2]) for x in (*s[1:3], *s[4:6]) if x)
        s[4:] = more
    elif op == "align":
        positions, width = s[0][3:]
        positions, source = min(ROWS, positions), (2, *s[1][1:])
        s[0], s[1], s[2], s[4] = (2, 1, 1, positions, width), source, source, (2, width)
        if len(s) > 7 and s[7] is not None:
            s[7] = (positions,)
    elif op in ("exchange", "merge"):
        s[0] = s[-1] = (2, min(ROWS, s[0][1]), s[0][2])
    elif op == "group_norm_silu":
        s[0] = (1, s[0][1], min(9, s[0][2]), min(8, s[0][3]))
    return tuple(s)


def cost(call: OpCall) -> int:
    """What a call reads and multiplies, roughly: the dearest are measured first."""
    sizes = [math.prod(x) for x in call.shapes if isinstance(x, tuple)]
    if call.op in ("attention", "align"):
        more = call.shapes[4] if call.op == "attention" and len(call.shapes) > 4 else None
        return 2 * sizes[0] * (call.shapes[1][1] + (more[1] if more else 0))
    width = call.shapes[1][-2] if isinstance(call.shapes[1], tuple) and sizes[1:] else 1
    return sizes[0] * (width if call.op in PRODUCTS else 1)


def candidates(
    call: OpCall, device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[..., Tensor]]:
    """Backend -> op, of those proved in general and at the call's widths; the usual one first."""
    proved = {}
    names = [choice.usual(call.op, device, dtype), *choice.BACKENDS]
    for name in dict.fromkeys(names):
        if not choice.serves(name, call.op, device, dtype)[0]:
            continue
        run = choice.backend_op(name, call.op)
        if proof.prove(run, call.op, device, dtype, [reduced(call.op, call.shapes)]).ok:
            proved[name] = run
    return proved


def compile_together(calls: Sequence[OpCall], device: torch.device, dtype: torch.dtype) -> None:
    """Let every candidate compile what it compiles, side by side, on few rows."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda call: candidates(call, device, dtype), calls))


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def _agrees(out: Tensor, usual: Tensor) -> bool:
    """At full size, where an index may overflow: both may lose what a few roundings cost."""
    allowed = 2 * proof.ROUNDINGS * torch.finfo(usual.dtype).eps
    off = (out - usual).float().norm() / usual.float().norm()
    return out.shape == usual.shape and float(off) <= allowed


def time_call(call: OpCall, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Backend -> least seconds, the usual one first; wrong at full size is left out."""
    arguments = proof.draw(call.op, call.shapes, device, dtype)
    runs = {name: partial(run, *arguments) for name, run in candidates(call, device, dtype).items()}
    usual = next(iter(runs))
    expected = runs[usual]()
    for name in list(runs):
        try:
            right = _agrees(runs[name](), expected)
        # out of memory, or a limit that small problems do not meet
        except RuntimeError:
            right = False
        if not right and name != usual:
            del runs[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    shortest = min(_seconds(run, device) for run in runs.values())
    rounds = min(MOST_ROUNDS, math.ceil(LEAST_S / max(shortest, 1e-9)))
    for _ in range(max(ROUNDS[device.type], rounds)):
        for name, run in runs.items():
            times[name].append(_seconds(run, device))
    # what else runs on the machine only adds: medians and low quantiles chose worse, and otherwise
    # in every run
    return {name: min(seconds) for name, seconds in times.items()}


def fastest(seconds: dict[str, float]) -> str:
    """The usual backend, which comes first, unless another is clearly faster."""
    usual = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < GAIN * seconds[usual] else usual


@torch.inference_mode()
def measured(
    calls: Sequence[OpCall], device: torch.device, dtype: torch.dtype, limit_s: float
) -> Iterator[tuple[OpCall, dict[str, float]]]:
    """Every call with its times, the dearest first, until the limit is reached.

    In each of PASSES passes; a later one yields the least of both times.
    """
    end = time.monotonic() + limit_s
    ordered = sorted(calls, key=cost, reverse=True)
    if device.type == "cuda":
        compile_together(ordered, device, dtype)
    least: dict[str, dict[str, float]] = {}
    for _ in range(PASSES):
        for call in ordered:
            if time.monotonic() >= end:
                return
            times, before = time_call(call, device, dtype), least.get(call.name, {})
            # one that was wrong in a pass is left out
            both = {name: min(s, before.get(name, s)) for name, s in times.items()}
            least[call.name] = {n: s for n, s in both.items() if not before or n in before}
            yield call, least[call.name]
