"""The choice is measured: a run, a second start, damage, two at once, another driver; pinned."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualdiff_engine import Engine
from dualdiff_engine.bench.step.case import MODELS, TEXT_TOKENS, network_config
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.model import binding, tuning
from dualdiff_engine.ops import BACKENDS, COUPLED, NAMES, bind, measure, record, reference, serves
from support import load_golden

CPU = torch.device("cpu")
F32 = torch.float32
CASE = load_golden("dual")
BASE, ADAPTER = CASE.folder / "model", CASE.folder / "adapter"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def network() -> tuning.Network:
    with engine() as built:
        return tuning.Network(
            built.base.unet_config,
            built.base.sample_size,
            built.text_encoder.tokenizer.model_max_length,
        )


def engine(**options: Any) -> Engine:
    return Engine.from_pretrained(BASE, adapter=ADAPTER, allow_pickle=True, **options)


def prefers(monkeypatch: pytest.MonkeyPatch, slow: Callable[[str, str], bool]) -> None:
    """Measure by decree: a backend takes a second for the calls that `slow` names, else less."""

    def times(call: measure.OpCall, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
        names = measure.candidates(call, device, dtype)
        return {name: 1.0 if slow(name, call.name) else 0.5 for name in names}

    monkeypatch.setattr(measure, "time_call", times)


def not_reference(name: str, call: str) -> bool:
    return name != "reference"


def test_every_place_makes_one_call_of_an_op(network: tuning.Network) -> None:
    """So that what differs by shape can be bound per place."""
    for by_place in network.calls(3).values():
        for place, calls in by_place.items():
            assert len({call.op for call in calls}) == len({call.name for call in calls}), place
        made = {call.op for calls in by_place.values() for call in calls}
        assert made == {*NAMES} - {"guided_step", *COUPLED}


def test_a_call_is_the_same_class_at_every_batch(network: tuning.Network) -> None:
    one, many = network.calls(1)["background"], network.calls(5)["background"]
    assert {p: [c.name for c in x] for p, x in one.items()} == {
        p: [c.name for c in x] for p, x in many.items()
    }
    assert any(a.shapes != b.shapes for p in one for a, b in zip(one[p], many[p], strict=True))


def test_a_reduced_problem_keeps_the_widths(network: tuning.Network) -> None:
    for call in {c.name: c for x in network.calls(4)["background"].values() for c in x}.values():
        small = measure.reduced(call.op, call.shapes)
        assert serves("reference", call.op, CPU, F32)[0]
        for given, kept in zip(call.shapes, small, strict=True):
            if isinstance(given, tuple) and call.op != "group_norm_silu":
                assert kept[-1] == given[-1]
        assert measure.candidates(call, CPU, F32), call.name


@pytest.mark.parametrize("model", ["demo", "sd15"])
def test_every_backend_that_is_proved_serves_every_call_of_a_network(model: str) -> None:
    """A budget that a right kernel meets by luck would leave it out of one call, or of all."""
    shape = tuning.Network(network_config(model), MODELS[model]["sample_size"], TEXT_TOKENS)
    calls = {c.name: c for kind in shape.calls(1).values() for x in kind.values() for c in x}
    for call in calls.values():
        served = {name for name in BACKENDS if serves(name, call.op, CPU, F32)[0]}
        assert served == set(measure.candidates(call, CPU, F32)), call.name


def test_a_run_measures_and_the_next_start_reads(
    network: tuning.Network, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    found = tuning.tune(network, CPU, F32, 4, 60, lambda done, *_: seen.append(done))
    assert seen == list(range(1, measure.PASSES * len(found.choices) + 1))
    assert all(min(times.values()) > 0 for times in found.seconds.values())
    for name, backend in found.choices.items():
        assert found.seconds[name][backend] <= min(found.seconds[name].values()) / measure.GAIN
    (path,) = cache.iterdir()
    assert path.suffix == ".json"
    # a start neither measures nor traces
    monkeypatch.setattr(measure, "time_call", None)
    monkeypatch.setattr(binding, "_traced", None)
    ops, places = tuning.settle(bind(), network, CPU, F32, 4)
    assert places == found.places
    usual = bind().recorded
    assert ops.recorded == usual | {
        name: backend
        for name, backend in found.choices.items()
        if backend != usual[name.partition("@")[0]]
    }


def test_what_is_measured_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine() as plain:
        usual = plain.generate(seeds=[3], steps=2, output_type="pt")[0]
        prefers(monkeypatch, not_reference)
        network = tuning.Network(
            plain.base.unet_config,
            plain.base.sample_size,
            plain.text_encoder.tokenizer.model_max_length,
        )
    tuning.tune(network, CPU, F32, 1)
    with engine() as tuned:
        pair = tuned.generate(seeds=[3], steps=2, output_type="pt")[0]
        bound = {place: getattr(m, a) for place, (m, a) in binding.places(tuned.unet).items()}
        for place, calls in network.calls(1)["plain"].items():
            for call in calls:
                assert getattr(bound[place], call.op) is getattr(reference, call.op)
    assert float((pair.image - usual.image).abs().max()) < 1e-3
    recorded = pair.recipe["backends"]
    classes = [name for name in recorded if "@" in name]
    assert all(recorded[name] == "reference" for name in classes)
    if set(usual.recipe["backends"].values()) != {"reference"}:
        assert classes
    # a recorded choice is taken as it is, whatever the cache says now
    for kept in (recorded, ",".join(f"{k}={v}" for k, v in recorded.items())):
        with engine(backend=kept, tune="never") as pinned:
            again = pinned.generate(seeds=[3], steps=2, output_type="pt")[0]
        assert again.recipe["backends"] == recorded
        assert torch.equal(again.image, pair.image)


def test_places_differ_where_their_shapes_do(
    network: tuning.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = sorted(
        {c.name for x in network.calls(1)["plain"].values() for c in x if c.op == "geglu"}
    )
    prefers(monkeypatch, lambda name, call: (name == "reference") != (call == names[0]))
    tuning.tune(network, CPU, F32, 1)
    with engine() as tuned:
        bound = {place: getattr(m, a) for place, (m, a) in binding.places(tuned.unet).items()}
        kinds = tuned._places["plain"]
        for place, calls in kinds.items():
            if names[0] in calls:
                assert bound[place].geglu is reference.geglu
            elif any(call in names for call in calls):
                assert bound[place].geglu is bind().geglu
    assert reference.geglu is not None


def test_an_untuned_batch_takes_the_nearest(
    network: tuning.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = record.Key.of(CPU, F32, network)
    for batch in (2, 32):
        record.write(key, batch, record.Record({"geglu@1": str(batch)}, {}))
    nearest = {batch: record.read(key, batch).choices["geglu@1"] for batch in (1, 3, 7, 9, 64)}  # type: ignore[union-attr]
    assert nearest == {1: "2", 3: "2", 7: "2", 9: "32", 64: "32"}
    assert [record.batch_class(batch) for batch in (1, 3, 5, 32, 40)] == [1, 4, 4, 32, 32]


def test_half_dtypes_share_and_drivers_do_not(
    network: tuning.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = record.Key.of(CPU, torch.bfloat16, network)
    assert half == record.Key.of(CPU, torch.float16, network)
    assert half != record.Key.of(CPU, F32, network)
    record.write(half, 1, record.Record({"geglu@1": "reference"}, {}))
    assert record.read(half, 1) is not None
    monkeypatch.setattr(record, "driver", lambda device_type: "999.1")
    assert record.read(record.Key.of(CPU, torch.bfloat16, network), 1) is None
    assert record.Key.of(CPU, F32, "another network") != record.Key.of(CPU, F32, network)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 1}',
        '{"format": 1, "key": {}, "choices": {}, "places": {}, "seconds": {}}',
        '{"format": 1, "key": {}, "choices": [], "places": {}, "seconds": {}}',
        '{"format": 1, "key": {}, "choices": {"a": 1}, "places": {"plain": 3}, "seconds": {}}',
    ],
)
def test_a_damaged_record_is_ignored_with_a_note(
    content: str, network: tuning.Network, caplog: pytest.LogCaptureFixture
) -> None:
    path = record.write(record.Key.of(CPU, F32, network), 1, record.Record({}, {}))
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        ops, places = tuning.settle(bind(), network, CPU, F32, 1)
    assert (ops, places) == (bind(), {})
    (line,) = caplog.messages
    assert line.startswith(str(path))
    assert line.endswith("run dualdiff tune again")


def test_a_choice_that_does_not_hold_here_is_left_out(network: tuning.Network) -> None:
    choices = {"geglu@1": "triton", "linear@1": "no-such-backend", "softmax@1": "reference"}
    places: Any = {"plain": {}, "background": {}}
    record.write(record.Key.of(CPU, F32, network), 1, record.Record(choices, places))
    ops, _ = tuning.settle(bind(), network, CPU, F32, 1)
    assert ops.recorded == bind().recorded
    # nor is one for an op whose backend the caller named
    record.write(record.Key.of(CPU, F32, network), 1, record.Record({"geglu@1": "widened"}, places))
    named = bind("geglu=reference")
    assert tuning.settle(named, network, CPU, F32, 1)[0].recorded == named.recorded


def test_two_processes_may_write_at_once(network: tuning.Network, cache: Path) -> None:
    key = record.Key.of(CPU, F32, network)
    many = {f"geglu@{n}": "reference" for n in range(2000)}

    def write(n: int) -> bool:
        record.write(key, 1, record.Record({**many, "linear@1": str(n)}, {}))
        found = record.read(key, 1)
        return found is not None and len(found.choices) == 2001

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(write, range(40)))
    # no partial file is left behind
    assert [p.suffix for p in cache.iterdir()] == [".json"]


def test_a_limit_leaves_the_rest_to_the_usual_choice(network: tuning.Network) -> None:
    found = tuning.tune(network, CPU, F32, 1, limit_s=0)
    assert not found.choices
    assert tuning.settle(bind(), network, CPU, F32, 1)[0].recorded == bind().recorded


def test_a_candidate_that_is_wrong_at_full_size_is_not_timed(
    network: tuning.Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = next(c for x in network.calls(4)["plain"].values() for c in x if c.op == "geglu")

    def overflows(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = reference.geglu(input, weight, bias)
        return out if out.numel() < 20_000 else -out

    names = {"reference": reference.geglu, "overflowing": overflows}
    monkeypatch.setattr(measure, "candidates", lambda *_: names)
    assert list(measure.time_call(call, CPU, F32)) == ["reference"]


def test_wrong_requests() -> None:
    with pytest.raises(SettingsError, match="tune must be one of auto, never, got 'always'"):
        Engine.from_pretrained(BASE, tune="always")
    with pytest.raises(BackendError, match="'geglu@4x9=triton' cannot be used: not triton"):
        bind("geglu@4x9=triton")
    with pytest.raises(BackendError, match="no op is called 'softmax'"):
        bind({"softmax@3": "reference"})


def test_the_command(capsys: pytest.CaptureFixture[str], cache: Path, tmp_path: Path) -> None:
    from dualdiff_engine.cli.main import main

    assert main(["tune", "--base", str(BASE), "--time-limit", "30"]) == 0
    out = capsys.readouterr().out
    assert f"kept in {cache}" in out
    assert "attention@" in out
    words = ["generate", "--base", str(BASE), "--adapter", str(ADAPTER), "--allow-pickle"]
    words += ["--steps", "1", "--quiet", "--out", str(tmp_path / "run"), "--seeds"]
    # a continued run keeps its choice when the record is gone
    assert main([*words, "1"]) == 0
    for path in cache.iterdir():
        path.unlink()
    assert main([*words, "1:3"]) == 0
    rows = (tmp_path / "run" / "manifest.jsonl").read_text().splitlines()
    first, second = (json.loads(row)["recipe"]["backends"] for row in rows)
    assert first == second
