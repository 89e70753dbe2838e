"""The parts of the GPU suite about kernels: each fills a record and names what is wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.bench import clock
from dualdiff_engine.bench.gpu import autotune, plan, step_parts
from dualdiff_engine.bench.gpu.record import Record, Setting
from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op import checks as op_checks
from dualdiff_engine.bench.op import roofline
from dualdiff_engine.bench.op.calls import Spec, trace, work
from dualdiff_engine.bench.step import measure
from dualdiff_engine.ops.triton import tuning

# of each kind, when it is interpreted
FEW = 2
# timed calls of each implementation, and seconds that each at most takes
ROUNDS = 9
# to time one configuration on one call: as many rounds of a call of some milliseconds, and checks
TIMED_S = 0.06


def machine(setting: Setting, record: Record) -> Iterator[str]:
    """The device and its ceilings."""
    if not setting.interpreted:
        for dtype in (torch.bfloat16, torch.float32):
            found = asdict(clock.ceilings(setting.device, dtype))
            record.add("ceilings", [{"dtype": str(dtype).removeprefix("torch."), **found}])
    record.save()
    yield from ()


def step_calls(setting: Setting) -> Counter[Spec]:
    """Every call of the steps that are timed, and how often one makes it."""
    calls: Counter[Spec] = Counter()
    for batch in setting.batches:
        for background in (False, True):
            calls |= trace(setting.model, batch, background=background)
    return calls


def default_jobs(setting: Setting) -> list[autotune.Job]:
    """What the checks and the steps compile without tuning, the dtype of the steps first."""
    checked = [
        *op_checks.ODD,
        *(trace(setting.model, 1) | trace(setting.model, 1, background=True)),
    ]
    small = [*trace("small", 1, 8, background=True), *trace("small", 1)]
    jobs = autotune.default_jobs(step_calls(setting), setting.dtype)
    for dtype in _dtypes(setting):
        jobs += autotune.default_jobs([*checked, *small], dtype)
    return [job for job, _ in autotune.distinct(jobs)]


def _dtypes(setting: Setting) -> tuple[torch.dtype, ...]:
    """To be checked, that of the steps first; every dtype is interpreted by the kernels' tests."""
    others = () if setting.interpreted else op_checks.DTYPES
    return tuple(dict.fromkeys([setting.dtype, *others]))


def compile_kernels(setting: Setting, record: Record) -> Iterator[str]:
    """Every default kernel, on every core, so that no later part waits for one."""
    jobs = default_jobs(setting)
    if setting.interpreted:
        jobs = jobs[:FEW]
    deadline = setting.deadline - plan.GRACE_S
    record.add("compiled", [autotune.precompile(jobs, setting.device, deadline)])
    yield from record.data["compiled"][0]["failed"]


def checks(setting: Setting, record: Record) -> Iterator[str]:
    """Every kernel, and the network made of them: first in the dtype of the steps."""
    device, interpreted = setting.device, setting.interpreted
    network = "tiny" if interpreted else "small"

    def rows() -> Iterator[dict[str, Any]]:
        for number, dtype in enumerate(_dtypes(setting)):
            with torch.inference_mode(), clock.exact_convolutions():
                yield from op_checks.accuracy(setting.model, device, [dtype])
                yield from op_checks.network(network, device, [dtype])
            if number == 0:
                with torch.inference_mode():
                    yield from op_checks.graphs(network, device, dtype)
                yield from op_checks.operators(device, interpreted=interpreted)

    for row in rows():
        record.add("checks", [row])
        if row["status"] != "ok" and not row["status"].startswith("not here"):
            yield f"{row['op']} {row['check']} {row['dtype']} {row['shapes']}: {row['status']}"
        if setting.left_s() < plan.GRACE_S:
            record.note(f"checks after {row['op']} {row['check']} {row['dtype']} left out: no time")
            return


def convolutions(setting: Setting, record: Record) -> Iterator[str]:
    """Every convolution of a step by cuDNN's first choice, and by the one that it measures."""
    watch = roofline.Surroundings(setting.dtype.itemsize)
    trace(setting.model, setting.batches[0], watch=watch)
    listed = watch.convolutions.most_common(FEW if setting.interpreted else None)
    for number, (call, count) in enumerate(listed):
        if setting.left_s() < plan.GRACE_S:
            record.note(f"{len(listed) - number} of {len(listed)} convolutions not run: no time")
            return
        row, wrong = _convolution(setting, call)
        record.add("rows", [{**asdict(call), "calls_per_step": count, **row}])
        if wrong:
            yield f"{call}: benchmark on and off differ by {wrong:.1e}"


@torch.inference_mode()
def _convolution(setting: Setting, call: roofline.Convolution) -> tuple[dict[str, Any], float]:
    """The facts of a row, and by how much the two differ if by more than two roundings."""
    device, dtype = setting.device, setting.dtype
    x, weight = (
        torch.randn(shape, device=device)
        .div_(size**0.5)
        .to(dtype, memory_format=torch.channels_last)
        for shape, size in ((call.input, 1), (call.weight, call.weight[1] * call.weight[2] ** 2))
    )

    def run(benchmark: bool) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            return F.conv2d(x, weight, None, call.stride, call.padding)

    variants = {"heuristic": partial(run, False), "benchmark": partial(run, True)}
    off, on = (variant() for variant in variants.values())
    apart = op_bench.relative(on, off.double())
    row: dict[str, Any] = {"difference": apart, "flops": 2 * off.numel() * weight[0].numel()}
    if not setting.interpreted:
        seconds = clock.interleaved(variants, device, ROUNDS, 1.0)
        row["ms"] = {name: measure.quantiles(taken) for name, taken in seconds.items()}
    return row, apart if apart > 2 * torch.finfo(dtype).eps else 0.0


def op_table(setting: Setting, record: Record) -> Iterator[str]:
    """Every op call of a large batch's step, by the libraries and every backend, heaviest first."""
    calls = trace(setting.model, setting.batches[0])
    device, dtype = setting.device, setting.dtype
    with torch.inference_mode():
        ceilings = None if setting.interpreted else clock.ceilings(device, dtype)
        record.data["ceilings"] = ceilings and asdict(ceilings)
        for number, spec in enumerate(sorted(calls, key=lambda s: -calls[s] * _weight(s, dtype))):
            if setting.left_s() < plan.GRACE_S:
                record.note(f"{len(calls) - number} of {len(calls)} calls not timed: no time")
                return
            rows = op_bench.rows_of(spec, calls[spec], device, dtype, ceilings, rounds=ROUNDS)
            record.add("rows", rows)
            for row in rows:
                if row["by"] in ops.BACKENDS and row["status"] != "ok":
                    yield f"{row['op']} {row['shapes']} by {row['by']}: {row['status']}"


def _weight(spec: Spec, dtype: torch.dtype) -> float:
    counted = work(spec, dtype)
    return counted.moved + counted.flops / 200


def tune(setting: Setting, record: Record) -> Iterator[str]:
    """Launch configurations of the classes in which Triton is near the best library."""
    dtype = setting.dtype
    with torch.inference_mode():
        groups = autotune.classes(step_calls(setting), dtype)
        if setting.interpreted:
            groups = groups[: 2 * FEW]
        chosen = _within_reach(setting, record, groups)
        if not setting.interpreted:
            chosen = _compiled_in_time(setting, record, chosen)
        for number, group in enumerate(chosen):
            if setting.left_s() < plan.GRACE_S:
                record.note(f"{len(chosen) - number} of {len(chosen)} classes not tuned: no time")
                return
            yield from _tune(setting, record, group)


def _tune(setting: Setting, record: Record, group: autotune.Class) -> Iterator[str]:
    timed = not setting.interpreted
    most = FEW if setting.interpreted else None
    found = autotune.tune(group, setting.device, setting.dtype, timed=timed, most=most)
    record.add("classes", [found])
    if found["tried"][0]["status"] != "ok":
        yield f"default of {group.table} {group.name}: {found['tried'][0]['status']}"
    if timed:
        capability = torch.cuda.get_device_capability(setting.device)
        path = tuning.write(capability, autotune.tables(record.data["classes"]))
        # beside the records, for machines that keep nothing else
        (setting.folder / path.name).write_bytes(path.read_bytes())


def _within_reach(
    setting: Setting, record: Record, groups: list[autotune.Class]
) -> list[autotune.Class]:
    """Those that no library beats by far: by the rows of `ops` where they are, else timed now."""
    earlier = setting.folder / "ops.json"
    rows = json.loads(earlier.read_text("utf-8")).get("rows", []) if earlier.is_file() else []
    ceilings = None if setting.interpreted else clock.Ceilings(1.0, 1.0)
    chosen = []
    for group in groups:
        ratio = autotune.standing(group, rows)
        # a third of the time is for this
        if (
            ratio is None
            and ceilings is not None
            and setting.left_s() > plan.PARTS["autotune"].least
        ):
            spec = max(group.calls, key=lambda s: group.calls[s] * _weight(s, setting.dtype))
            own = op_bench.rows_of(spec, 1, setting.device, setting.dtype, ceilings, rounds=3)
            one = autotune.Class(group.table, group.name, group.default, Counter([spec]))
            ratio = autotune.standing(one, own)
        if ratio is not None and ratio[0] > autotune.NEAR:
            far = {"table": group.table, "class": group.name, "by": ratio[1], "ratio": ratio[0]}
            record.add("left_to_libraries", [far])
        else:
            chosen.append(group)
    return chosen


def _compiled_in_time(
    setting: Setting, record: Record, groups: list[autotune.Class]
) -> list[autotune.Class]:
    """Compile the candidates of as many classes as can be timed afterwards; those classes."""
    seen: set[Hashable] = set()
    jobs = [autotune.distinct(autotune.tuning_jobs(g, setting.dtype), seen) for g in groups]
    timed = [TIMED_S * len(autotune.tuning_jobs(g, setting.dtype)) for g in groups]
    seconds, cores = setting.left_s() - plan.GRACE_S, autotune.cores()
    kernels = [sum(count for _, count in of_group) for of_group in jobs]
    count = plan.affordable(kernels, timed, seconds, cores)
    if count < len(groups):
        record.note(f"{len(groups) - count} of {len(groups)} classes not tuned: no time to compile")
    listed = [job for of_group in jobs[:count] for job, _ in of_group]
    deadline = setting.deadline - plan.GRACE_S - sum(timed[:count])
    record.add("compiled", [autotune.precompile(listed, setting.device, deadline)])
    return groups[:count]


Run = Callable[[Setting, Record], Iterator[str]]
RUNS: dict[str, Run] = {
    "machine": machine,
    "compile": compile_kernels,
    "checks": checks,
    "convolutions": convolutions,
    "ops": op_table,
    "autotune": tune,
    **step_parts.RUNS,
}
