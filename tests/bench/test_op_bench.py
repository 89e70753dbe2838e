"""The per-op bench and the roofline: what is counted, when a speed is withheld, the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dualdiff_engine import ops
from dualdiff_engine.bench import cli, clock
from dualdiff_engine.bench.gpu import autotune
from dualdiff_engine.bench.op import auto, roofline
from dualdiff_engine.bench.op import bench as op_bench
from dualdiff_engine.bench.op.calls import Spec, coupled, trace, work
from dualdiff_engine.bench.op.cases import Problem, problem
from dualdiff_engine.bench.step import measure
from dualdiff_engine.bench.step.case import Case
from dualdiff_engine.ops import measure as op_measure
from dualdiff_engine.ops.proof import alignment
from dualdiff_engine.ops.triton.tuning import Config

CPU = torch.device("cpu")
SPECS = {
    "linear": Spec("linear", ((3, 5, 16), (8, 16), (8,), (3, 5, 8))),
    "branch_linear": Spec("branch_linear", ((2, 12, 16), (2, 24, 16), None, (2, 3, 16), (1,))),
    "attention": Spec("attention", ((3, 9, 32), (3, 7, 32), (3, 7, 32), 2)),
    "exchange": Spec("exchange", ((2, 9, 16), (16, 16), (16,), (16, 16), (16,), (2, 9, 16))),
    "merge": Spec("merge", ((2, 9, 16), (2, 16, 16), (2, 9, 16))),
    "align": Spec("align", alignment((2, 2, 3, 9, 32), 7, 2, (3, 9), 2.5)),
    "group_norm_silu": Spec("group_norm_silu", ((3, 16, 5, 7), 4, (16,), (16,), 1e-5)),
    "geglu": Spec("geglu", ((3, 9, 16), (32, 16), (32,))),
    "guided_step": Spec("guided_step", ((2, 2, 3, 4, 5, 7), 2.5)),
}


@pytest.mark.parametrize("background", [False, True])
def test_counted_work_is_that_of_the_network(background: bool) -> None:
    rates = roofline.Rates(1.0, 1.0, 1.0)
    rows = roofline.step("small", 2, background=background, dtype=torch.float32, rates=rates)
    case = Case("small", 2, 50, 24, 24, 2.5, background, 0)
    assert sum(row["flops"] for row in rows) == measure.count_flops(case, "engine")
    between = {"convolution", "convolution bias", "layer norm", "group norm", "residual add"}
    between |= {"concatenation", "upsampling", "copy"}
    # a call of PyTorch's that has no name here would show under its own
    assert {row["op"] for row in rows} == {*ops.NAMES, *between} - {*ops.COUPLED}


def test_work_between_the_ops_follows_from_shapes() -> None:
    """SD-1.5 at two pairs: maps of four sizes, two branches, two guidance rows."""
    pairs, size, item = 2, 64, torch.bfloat16.itemsize
    rates = roofline.Rates(1.0, 1.0, 1.0)
    rows = roofline.step("sd15", pairs, background=False, dtype=torch.bfloat16, rates=rates)
    moved = {row["op"]: row["moved"] for row in rows}
    calls = {row["op"]: row["calls"] for row in rows}
    # channels, and positions of both branches and guidance rows
    levels = [(c, 4 * pairs * (size >> i) ** 2) for i, c in enumerate((320, 640, 1280, 1280))]
    # the first site tells the guidance rows apart: what comes before it has half of the positions
    first = levels[0][0] * levels[0][1] // 2
    # 5 transformers on each of the three upper levels, 1 in the middle: a norm before each
    maps = sum(5 * c * n for c, n in levels[:3]) + levels[3][0] * levels[3][1]
    assert calls["group norm"] == 16
    assert moved["group norm"] == pytest.approx(2 * item * (maps - first), rel=1e-3)
    # and three LayerNorms in each, of which the first two of the first block come before it
    assert calls["layer norm"] == 3 * 16
    assert moved["layer norm"] == pytest.approx(2 * item * (3 * maps - 2 * first), rel=1e-3)
    # two resnets a level on the way down, three on the way up, two in the middle
    resnets = sum(5 * c * n for c, n in levels) + 2 * levels[3][0] * levels[3][1]
    assert calls["residual add"] == 22
    assert moved["residual add"] == 3 * item * (resnets - first)
    # what is joined is read and written: the widths that the up path's first convolutions take
    widths = ((2560, 2560, 2560), (2560, 2560, 1920), (1920, 1280, 960), (960, 640, 640))
    joined = sum(sum(w) * n for w, (_, n) in zip(widths, reversed(levels), strict=True))
    assert moved["concatenation"] == 2 * item * joined
    doubled = [(c, n) for c, (_, n) in zip((1280, 1280, 640), reversed(levels[1:]), strict=True)]
    assert moved["upsampling"] == item * sum(5 * c * n for c, n in doubled)


def test_the_floor_of_a_step_of_32_pairs() -> None:
    """Predicted, from counted work and the rates that the command states."""
    rates = roofline.Rates(*(1e12 * x for x in roofline.DEFAULT_RATES))
    rows = roofline.step("sd15", 32, background=False, dtype=torch.bfloat16, rates=rates)
    assert sum(row["seconds"] for row in rows) == pytest.approx(0.158, abs=5e-4)


def test_the_largest_of_three_bounds_counts() -> None:
    counted = work(SPECS["attention"], torch.float32)
    # 3 rows, 2 heads, 9 queries, 7 keys of width 16
    assert (counted.flops, counted.exps) == (4 * 3 * 2 * 9 * 7 * 16, 3 * 2 * 9 * 7)
    assert counted.moved == 4 * 32 * 3 * (9 + 7 + 7 + 9)
    for rates, bound in (((1, 1e9, 1e9), "products"), ((1e9, 1, 1e9), "bytes")):
        assert roofline.Rates(*rates).floor(counted)[1] == bound
    assert roofline.Rates(1e9, 1e9, 1).floor(counted) == (counted.exps, "exponentials")


@pytest.mark.parametrize("op", ops.NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_backend_is_green_beside_the_plain_formula(op: str, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        rows = op_bench.rows_of(SPECS[op], 3, CPU, dtype, None)
    proved = {b: ops.serves(b, op, CPU, dtype)[0] for b in ops.BACKENDS}
    assert {row["by"] for row in rows} >= {op_bench.PLAIN, *(b for b, ok in proved.items() if ok)}
    for row in rows:
        if proved.get(row["by"], True):
            assert row["status"] == "ok"
            assert row["error"] <= row["budget"]
        else:
            assert row["status"].startswith("does not run: ")
    assert not any("ms" in row for row in rows)


def test_the_calls_of_another_coupling() -> None:
    """One form of each site: both branches' keys for all queries, drawn text scores, a merge."""
    traced = trace("small", 2)
    found = coupled(traced, 2)
    by_op = {op: [s for s in found if s.op == op] for op in ("attention", "merge", "align")}
    assert sum(found.values()) == sum(
        n for s, n in traced.items() if s.op in ("attention", "exchange")
    )
    for spec in by_op["attention"]:
        query, key, _, _, more, _ = spec.arguments
        assert query[0] == 2 * key[0]
        assert key == more
        plain = Spec(
            "attention", (query, *[(query[0], 2 * query[1], query[2])] * 2, spec.arguments[3])
        )
        assert work(spec, torch.float32).flops == work(plain, torch.float32).flops
    for spec in by_op["align"]:
        assert spec.arguments[0][:3] == (2, 2, 2)
    exchanged = {s.arguments[0]: n for s, n in traced.items() if s.op == "exchange"}
    assert {s.arguments[0]: found[s] for s in by_op["merge"]} == exchanged
    with torch.inference_mode():
        for spec in (by_op["attention"][-1], by_op["align"][-1], by_op["merge"][-1]):
            rows = op_bench.rows_of(spec, 1, CPU, torch.float32, None)
            assert {row["status"] for row in rows} == {"ok"}


@pytest.mark.parametrize("model", ["demo", "sd15"])
def test_calls_of_another_coupling_are_measured_by_backend(model: str) -> None:
    """Each has a class of its own, and every backend that serves the op is proved for it."""
    traced = trace(model, 1)
    found = [*coupled(traced, 1), Spec("align", alignment((2, 2, 1, 64, 320), 77, 8, (64,), 2.0))]
    calls = [
        op_measure.OpCall(s.op, op_measure.shape_class(s.op, s.arguments), s.arguments)
        for s in found
    ]
    plain = {f"{s.op}@{op_measure.shape_class(s.op, s.arguments)}" for s in traced}
    assert not plain & {call.name for call in calls}
    assert len({call.name for call in calls}) == len(calls)
    for call in calls:
        served = {b for b in ops.BACKENDS if ops.serves(b, call.op, CPU, torch.float32)[0]}
        assert served == set(op_measure.candidates(call, CPU, torch.float32)), call.name
        assert op_measure.cost(call) > 0
        small = op_measure.reduced(call.op, call.shapes)
        assert small[0][-1] == call.shapes[0][-1]
        assert op_measure.reduced(call.op, small) == small


def test_shared_keys_are_timed_beside_copies_of_them() -> None:
    spec = Spec("attention", ((4, 9, 32), *[(2, 9, 32)] * 2, 2, *[(2, 9, 32)] * 2))
    with torch.inference_mode():
        rows = op_bench.rows_of(spec, 1, CPU, torch.float32, clock.Ceilings(1e9, 1e9), rounds=3)
    by = {row["by"]: row for row in rows}
    assert by["reference" + op_bench.OWN]["status"] == "ok"
    assert by["reference"]["rate_to_own_keys"] > 0
    assert "rate_to_own_keys" not in by["reference" + op_bench.OWN]


def test_a_wrong_result_has_no_speed() -> None:
    case = problem(SPECS["geglu"], CPU, torch.float32)
    wrong: dict[str, op_bench.Run] = {
        "inexact": lambda: case.plain(*case.arguments) * (1 + 1e-5),
        "unwritten": lambda: case.arguments[0].new_empty(3, 9, 16),
        "wide": lambda: case.plain(*case.arguments).double(),
        "absent": lambda: torch.ops.no.such_op(),
    }
    checked = op_bench.check(case, wrong)
    assert [checked[name]["status"] for name in wrong][:3] == [op_bench.RED] * 3
    assert checked["absent"]["status"].startswith("does not run: ")


def test_a_red_row_is_shown_without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def variants(case: Problem, *_: object) -> dict[str, op_bench.Run]:
        plain = partial(case.plain, *case.arguments)
        return {op_bench.PLAIN: plain, "wrong": lambda: case.arguments[0][:, 0].float()}

    # a backend that is wrong is not served in the first place
    monkeypatch.setattr(op_bench, "variants", variants)
    ceilings = clock.Ceilings(1e9, 1e9)
    with torch.inference_mode():
        rows = op_bench.rows_of(SPECS["guided_step"], 1, CPU, torch.float32, ceilings, rounds=3)
    by = {row["by"]: row for row in rows}
    assert "ms" in by["eager"]
    assert "ms" not in by["wrong"]
    assert op_bench.RED in op_bench.table(rows)


def test_ops_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ops.json"
    words = ["ops", "--ops", "guided_step", "--rounds", "3", "--no-compile", "--device", "cpu"]
    cli.main([*words, "--output-json", str(path)])
    out = capsys.readouterr().out
    assert "guided_step" in out
    record = json.loads(path.read_text())
    assert record["case"] == {"model": "demo", "batch": 1, "size": 128, "background": False}
    assert record["ceilings"]["bytes_per_s"] > 1e8
    (eager,) = (row for row in record["rows"] if row["by"] == "eager")
    assert eager["calls_per_step"] == 1
    assert eager["speedup_over_eager"] == 1
    assert 0 < eager["ms"]["p20"] <= eager["ms"]["p80"]


def test_the_choice_of_auto_is_compared_with_the_best() -> None:
    specs = [SPECS["geglu"], SPECS["linear"], SPECS["exchange"]]
    rows = [
        {"op": spec.op, "shapes": spec.label, "by": by, "ms": {"p50": ms}, "calls_per_step": calls}
        for spec, times, calls in zip(
            specs, ([1.0, 1.02], [1.0, 2.0], [1.0, 9.0]), (1, 2, 7), strict=True
        )
        for by, ms in zip(("reference", "onednn"), times, strict=True)
    ]
    choices = dict(zip(specs, ("onednn", "onednn", "reference"), strict=True))
    lines = auto.verdict(rows, choices).splitlines()
    assert lines[0] == "auto: 2 of 3 calls within 0.97 of the best"
    assert lines[1] == f"  0.50 linear {SPECS['linear'].label}: onednn, best reference"
    # (1.02 + 2 x 2 + 7) over (1 + 2 + 7)
    assert lines[2:] == ["auto: all calls of a step take 1.202 of the best choices"]
    assert auto.verdict([], choices) == "auto: nothing was timed"


def test_every_call_has_a_choice() -> None:
    found = auto.taken("tiny", 3, CPU, torch.float32, background=True, limit_s=None)
    assert found.keys() == trace("tiny", 3, background=True).keys()
    assert set(found.values()) <= set(ops.BACKENDS)


def test_roofline_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["roofline", "--model", "small", "--batch", "2", "--products", "100"])
    out = capsys.readouterr().out
    assert "nothing is measured" in out
    assert "100 TFLOP/s" in out
    assert (
        len([line for line in out.splitlines() if line.startswith(("convolution ", "step"))]) == 3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ops", "--ops", "softmax"], "no op 'softmax'"),
        (["ops", "--batch", "0"], "--batch and --rounds must be at least 1"),
        (["ops", "--output-json", "no/such/r.json"], "no folder 'no/such'"),
        (["roofline", "--copy", "0"], "every rate above 0"),
    ],
)
def test_wrong_arguments(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_interleaved_rounds_are_as_many_for_each() -> None:
    called: list[str] = []
    work: dict[str, Any] = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = clock.interleaved(work, CPU, rounds=4, warm_up=1)
    assert called == ["a", "b"] * 5
    assert [len(s) for s in seconds.values()] == [4, 4]


def test_autotuning_keeps_the_default_unless_it_is_beaten() -> None:
    configs = [Config({"BLOCK": size}) for size in (1, 2, 3)]

    def winner(*facts: tuple[str, float]) -> Any:
        tried = [
            {"config": {"blocks": c.blocks}, "status": status}
            for c, (status, _) in zip(configs, facts, strict=True)
        ]
        return autotune._winner(tried, [seconds for _, seconds in facts])

    assert winner(("ok", 1.0), ("ok", 0.99), ("ok", 2.0))["winner"] == {"blocks": {"BLOCK": 1}}
    assert winner(("ok", 1.0), ("ok", 0.5), ("red", 0.1)) == {
        "winner": {"blocks": {"BLOCK": 2}},
        "speedup_over_default": 2.0,
    }
    assert winner(("red", 0.0), ("ok", 0.5), ("ok", 0.6))["winner"] == {"blocks": {"BLOCK": 2}}
    assert winner(*[("red", 0.0)] * 3)["winner"] is None


def test_traced_calls_have_the_shapes_of_the_batch() -> None:
    one, two = trace("small", 1), trace("small", 2)
    assert sum(one.values()) == sum(two.values())
    (guided,) = (spec for spec in two if spec.op == "guided_step")
    assert guided.arguments[0] == (2, 2, 2, 4, 24, 24)
