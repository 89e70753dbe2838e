"""dualdiff-bench --end-to-end: what it measures, reckons and refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine.bench import cli, end_to_end

TINY = ["--end-to-end", "--batch", "2", "--size", "64", "--rounds", "1"]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bench") / "r.json"
    cli.main([*TINY, "--preset", "draft", "--timed-calls", "20", "--output-json", str(path)])
    return json.loads(path.read_text())


def test_stages_and_runs(record: dict[str, Any]) -> None:
    released, engine = record["peers"]
    assert (released["calls"], released["calls_made"]) == (101, 20)
    assert (engine["calls"], engine["calls_made"]) == (10, 10)
    # of an interrupted schedule there is no whole run
    assert released["run_s_per_pair"] is None
    assert engine["run_s_per_pair"] > 0
    for row in record["peers"]:
        assert list(row["seconds_per_pair"]) == list(end_to_end.STAGES)
        assert all(seconds >= 0 for seconds in row["seconds_per_pair"].values())
        # one round: the median is the sum itself
        total = sum(row["seconds_per_pair"].values())
        assert row["total_s_per_pair"] == pytest.approx(total)
    # ten calls of folded weights against a hundred and one, and the same decoder
    assert engine["flops_per_pair"] < 0.12 * released["flops_per_pair"]


def test_what_is_printed(record: dict[str, Any]) -> None:
    head, *rows = end_to_end.cells(record)
    assert len(head) == len(rows[0]) == len(end_to_end.COLUMNS)
    assert head[10] == "1.00x"
    headline = end_to_end.headline(record)
    assert "preset draft" in headline
    assert "20 calls were made, all counted" in headline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calls", "5"], "does not take --calls"),
        (["--plot", "x.png"], "does not take --plot"),
        (["--timed-calls", "1"], "--timed-calls must be at least 2"),
        (["--peers", "engine,diffusers"], "no peer that draws whole pairs 'diffusers'"),
        (["--output-json", "nowhere/r.json"], "no folder 'nowhere'"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main([*TINY, *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_timed_calls_need_whole_pairs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["dualdiff-bench", "--timed-calls", "3"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--timed-calls goes with --end-to-end" in capsys.readouterr().err
