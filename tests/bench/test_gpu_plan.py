"""The GPU suite is planned to fit its time: limits, what is compiled, and a simulated clock."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.gpu import autotune, launches, parts, plan, suite
from dualdiff_engine.bench.gpu.record import Setting
from dualdiff_engine.bench.op.calls import Spec, few_rows
from dualdiff_engine.ops.triton.tuning import Config

BF16 = torch.bfloat16
# of the machine that is lent, and a small one
CORES = (14, 2)


@pytest.fixture(scope="module")
def calls() -> Counter[Spec]:
    return parts.step_calls(Setting(Path(), time.monotonic() + 1e6, interpreted=False))


@pytest.fixture(scope="module")
def kernels(calls: Counter[Spec]) -> dict[str, list[int]]:
    """Part -> kernels to compile, by class where there are classes."""
    setting = Setting(Path(), time.monotonic() + 1e6, interpreted=False)
    jobs = autotune.distinct(parts.default_jobs(setting))
    seen: set[Hashable] = set()
    tuned = [
        sum(n for _, n in autotune.distinct(autotune.tuning_jobs(group, BF16), seen))
        for group in autotune.classes(calls, BF16)
    ]
    return {"compile": [sum(n for _, n in jobs)], "autotune": tuned}


def test_limits_add_up_to_one_command() -> None:
    assert sum(part.most for part in plan.PARTS.values() if part.call) <= plan.TOTAL_S
    assert all(part.least <= part.most for part in plan.PARTS.values())
    for call in (None, *plan.CALLS):
        given, dropped = plan.plan(plan.of_call(call), plan.TOTAL_S)
        assert not dropped
        assert sum(given.values()) <= plan.TOTAL_S
    named = {name for call in plan.CALLS for name in plan.of_call(call)}
    assert named == set(plan.of_call(None)) == {n for n, part in plan.PARTS.items() if part.call}
    # checks come before anything is timed, and kernels are compiled before that
    assert plan.of_call(1)[:3] == ["machine", "compile", "checks"]


def test_a_plan_drops_what_does_not_fit() -> None:
    given, dropped = plan.plan(["machine", "compile", "checks", "convolutions"], 110)
    assert given == {"machine": 25, "compile": 70, "convolutions": 15}
    assert dropped == {"checks": "skipped: 15 s left, it needs 20 s"}
    assert plan.plan(["steps"], 30) == ({"steps": 30}, {})


def test_what_can_be_compiled_and_timed() -> None:
    assert plan.compile_s(0, 8) == 0
    assert plan.compile_s(16, 8) == pytest.approx(plan.START_S + 2 * plan.KERNEL_S)
    costs = ([20, 20, 20], [5.0, 5.0, 5.0])
    need = plan.START_S + 60 * plan.KERNEL_S + 15
    assert plan.affordable(*costs, need, 1) == 3
    assert plan.affordable(*costs, need - 0.1, 1) == 2
    assert plan.affordable(*costs, 1, 1) == 0


@pytest.mark.parametrize("cores", CORES)
def test_a_simulated_run_ends_in_time(
    kernels: dict[str, list[int]], tmp_path: Path, cores: int
) -> None:
    """Compiling takes 0.7 s of a core per kernel; parts end by themselves before their limit."""
    now = 0.0
    wanted = {name: plan.compile_s(sum(counts), cores) for name, counts in kernels.items()}
    short: list[str] = []

    def start(name: str, folder: Path, seconds: float, interpreted: bool) -> str:
        nonlocal now
        # processes of a part start, and end GRACE_S early, as `precompile` and the loops do
        took = plan.START_S + max(wanted.get(name, 0), plan.PARTS[name].least - plan.START_S)
        if took > seconds - plan.GRACE_S:
            short.append(name)
        now += min(took, seconds)
        return "ok"

    names = plan.of_call(None)
    statuses = suite.run_all(
        tmp_path, names, plan.TOTAL_S, interpreted=False, start=start, clock=lambda: now
    )
    assert list(statuses) == names
    assert now <= plan.TOTAL_S
    if cores == CORES[0]:
        assert set(statuses.values()) == {"ok"}
        assert "compile" not in short
        assert "autotune" not in short
    else:
        # what is not compiled beforehand is compiled, or left out, by the parts themselves
        assert short[:1] == ["compile"]


def test_every_part_cut_still_ends_in_time(tmp_path: Path) -> None:
    now = 0.0

    def start(name: str, folder: Path, seconds: float, interpreted: bool) -> str:
        nonlocal now
        now += seconds
        return f"cut after {seconds:.0f} s"

    suite.run_all(
        tmp_path, plan.of_call(None), 200, interpreted=False, start=start, clock=lambda: now
    )
    assert 190 < now <= 200


def test_classes_are_tuned_as_far_as_time_allows(
    calls: Counter[Spec], kernels: dict[str, list[int]]
) -> None:
    counts = kernels["autotune"]
    groups = autotune.classes(calls, BF16)
    timed = [parts.TIMED_S * len(autotune.tuning_jobs(group, BF16)) for group in groups]
    seconds = plan.PARTS["autotune"].most - 2 * plan.GRACE_S
    many, few = (plan.affordable(counts, timed, seconds, cores) for cores in CORES)
    # the heaviest third on the lent machine, were no library far ahead of any
    assert many >= len(groups) / 3 > few > 0
    assert plan.compile_s(sum(counts[:many]), CORES[0]) + sum(timed[:many]) <= seconds


def test_few_candidates(calls: Counter[Spec], kernels: dict[str, list[int]]) -> None:
    for group in autotune.classes(calls, BF16):
        for spec in group.calls:
            assert 1 <= len(launches.candidates(spec, BF16)) <= 8, spec
    assert sum(kernels["autotune"]) <= 480


def test_few_rows_compile_the_same_kernels(calls: Counter[Spec]) -> None:
    largest = 0
    for spec in calls:
        few, question = few_rows(spec), launches.asked(spec, BF16)
        for config in [question and question[-1], *launches.candidates(spec, BF16)]:
            full, small = (
                {launches.key(x) for x in launches.compilations(s, BF16, config)}
                for s in (spec, few)
            )
            assert full == small, (spec, config)
            assert full
        sizes = [math.prod(x) for x in few.arguments if isinstance(x, tuple)]
        largest = max(largest, sum(sizes))
    # fourteen processes hold no more than this each, in bf16
    assert largest * BF16.itemsize < 64 * 2**20


def test_a_failed_job_says_why() -> None:
    wrong = autotune.Job(Spec("geglu", ((2, 8), (6, 9), (6,))), torch.float32, None)
    assert autotune.compile_job(wrong, "cpu")


def test_inputs_that_do_not_fit_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(autotune, "problem", full)
    spec = Spec("exchange", ((2, 64, 320), (320, 320), (320,), (320, 320), (320,), (2, 64, 320)))
    (group,) = autotune.classes(Counter([spec]), BF16)
    found = autotune.tune(group, torch.device("cpu"), BF16, timed=True)
    assert found["winner"] is None
    assert {facts["status"] for facts in found["tried"]} == {
        "does not run: OutOfMemoryError: CUDA out of memory"
    }


def test_standing_against_the_best_library() -> None:
    one, two = (Spec("linear", ((1, rows, 8), (4, 8))) for rows in (16, 32))
    group = autotune.Class("branch_linear", "any", Config(), Counter({one: 1, two: 3}))

    def row(spec: Spec, by: str, ms: float) -> dict[str, Any]:
        return {"op": spec.op, "shapes": spec.label, "by": by, "ms": {"p50": ms}}

    rows = [row(one, "triton", 2), row(one, "F.linear", 1), row(one, "eager", 0.1)]
    assert autotune.standing(group, rows) is None
    rows += [row(two, "triton", 2), row(two, "F.linear", 3), row(two, "reference", 1)]
    assert autotune.standing(group, rows) == (8 / 4, "reference")


def test_the_commit_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALDIFF_COMMIT", "abc1234")
    assert machine.commit() == "abc1234"
    monkeypatch.delenv("DUALDIFF_COMMIT")
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None
    assert set(machine.tf32()) == {"matmul", "cudnn", "float32_matmul_precision"}
