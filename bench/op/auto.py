"""What `auto` takes for each call of a step, and how far that is from the best fixed choice."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dualdiff_engine import ops
from dualdiff_engine.bench.op.calls import Spec, trace
from dualdiff_engine.bench.step.case import MODELS, TEXT_TOKENS, network_config
from dualdiff_engine.model import tuning
from dualdiff_engine.ops.measure import shape_class

# of the best: what a choice may lose before it counts as wrong
ENOUGH = 0.97


def taken(
    model: str,
    pairs: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    background: bool,
    limit_s: float | None,
) -> dict[Spec, str]:
    """Call -> the backend that `auto` takes: as measured on this machine, else the usual one.

    limit_s: measure first, for so many seconds.
    """
    network = tuning.Network(network_config(model), MODELS[model]["sample_size"], TEXT_TOKENS)
    if limit_s is not None:
        tuning.tune(network, device, dtype, pairs, limit_s)
    bound = ops.bind(device=device, dtype=dtype)
    start = time.perf_counter()
    chosen = tuning.settle(bound, network, device, dtype, pairs, "never")[0].recorded
    print(f"auto: choices read in {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)
    one, many = trace(model, 1, background=background), trace(model, pairs, background=background)
    found = {}
    for spec, batched in zip(one, many, strict=True):
        name = f"{spec.op}@{shape_class(spec.op, spec.arguments)}"
        found[batched] = chosen.get(name, chosen[spec.op])
    return found


def verdict(rows: Iterable[Mapping[str, Any]], choices: Mapping[Spec, str]) -> str:
    """In words: the calls whose choice is slower than the best backend by more than it may be.

    And what all calls of a step take with the choices, over what they take with the best of each.
    """
    times: dict[tuple[str, str], dict[str, float]] = {}
    made: dict[tuple[str, str], int] = {}
    for row in rows:
        if "ms" in row and row["by"] in ops.BACKENDS:
            call = row["op"], row["shapes"]
            times.setdefault(call, {})[row["by"]] = row["ms"]["p50"]
            made[call] = row["calls_per_step"]
    shares: list[tuple[float, str]] = []
    taken = best_of_all = 0.0
    for spec, backend in choices.items():
        by = times.get((spec.op, spec.label), {})
        if backend in by:
            best = min(by, key=lambda name: by[name])
            what = f"{spec.op} {spec.label}: {backend}, best {best}"
            shares.append((by[best] / by[backend], what))
            taken += made[spec.op, spec.label] * by[backend]
            best_of_all += made[spec.op, spec.label] * by[best]
    if not shares:
        return "auto: nothing was timed"
    slow = sorted(pair for pair in shares if pair[0] < ENOUGH)
    lines = [f"auto: {len(shares) - len(slow)} of {len(shares)} calls within {ENOUGH} of the best"]
    lines += [f"  {share:.2f} {what}" for share, what in slow]
    lines.append(f"auto: all calls of a step take {taken / best_of_all:.3f} of the best choices")
    return "\n".join(lines)
