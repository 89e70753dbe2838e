"""Seeded faults: every one ends in a result or in one line, none hangs, none fills the memory.

The gate tries a few of each kind. `make faults` tries all, and writes the record that the table in
docs/faults.md is made from. `DUALDIFF_FAULTS="adapter:17" pytest tests/faults` tries one again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from disturbed_runs import may_mount
from dualdiff_engine.bench import machine
from fault_lab import REFUSED, RESULT, Lab, Try

RECORD = Path(__file__).parents[2] / "bench" / "results" / "faults.json"
ASKED = os.environ.get("DUALDIFF_FAULTS", "")
FULL = ASKED == "full"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks, and reads memory as Linux counts it"
)


@dataclass(frozen=True)
class Kind:
    """title: for the table. gate, full: how many are tried."""

    title: str
    gate: int
    full: int


KINDS = {
    "adapter": Kind("An adapter file is damaged", 30, 360),
    "base": Kind("A file of a base model folder is damaged, gone or not a file", 6, 320),
    "picture": Kind("A picture or mask is damaged, or unpacks to very much", 80, 720),
    "manifest": Kind("A manifest, or a picture that it lists, is damaged", 20, 120),
    "state": Kind("The state of a training run is damaged", 2, 36),
    "kill generate": Kind("`dualdiff generate` is killed (SIGKILL), then continued", 2, 52),
    "kill train": Kind("`dualdiff train` is killed (SIGKILL), then continued", 0, 52),
    "kill command generate": Kind("The same, started from a shell: `generate`", 0, 3),
    "kill command train": Kind("The same, started from a shell: `train`", 0, 2),
    "full disk generate": Kind("The disk is full under `generate`, then continued", 1, 14),
    "full disk train": Kind("The disk is full under `train`, then continued", 0, 8),
    "quota generate": Kind("The quota is used up under `generate`, then continued", 1, 6),
    "quota train": Kind("The quota is used up under `train`, then continued", 0, 4),
    "read-only": Kind("The disk is read-only, then continued", 1, 4),
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    at_once = len(os.sched_getaffinity(0)) if FULL else 1
    with Lab(tmp_path_factory.mktemp("lab"), at_once) as lab:
        yield lab


@pytest.fixture(scope="module")
def head() -> dict[str, Any]:
    """Of the record: commit and machine."""
    return machine.facts("cpu") if FULL else {}


def seeds_of(kind: str) -> list[int]:
    if ":" in ASKED:
        name, _, numbers = ASKED.partition(":")
        return [int(number) for number in numbers.split(",")] if name == kind else []
    return list(range(KINDS[kind].full if FULL else KINDS[kind].gate))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_every_fault_ends_in_a_result_or_in_one_line(
    kind: str, lab: Lab, head: dict[str, Any], tmp_path: Path
) -> None:
    seeds = seeds_of(kind)
    if not seeds:
        pytest.skip("tried by `make faults`")
    if kind == "read-only" and not may_mount(tmp_path):
        pytest.skip("this machine lets no test mount a disk of its own")
    tries = lab.tries(kind, seeds)
    for one in tries:
        print(f"{one.seed:4} {one.seconds:5.2f} s {one.mib:5.0f} MiB  {one.fault}: {one.message}")
    bad = [one for one in tries if one.end not in (RESULT, REFUSED)]
    assert not bad, "\n\n".join(told(one) for one in bad)
    if FULL:
        write(head, row(kind, tries))


def told(one: Try) -> str:
    return f"{one.kind}:{one.seed} ({one.fault}): {one.end}\n{one.message}"


def write(head: dict[str, Any], new: dict[str, Any]) -> None:
    """Replace one row of the record, which may be tried again alone: `-k "kill and train"`."""
    known = json.loads(RECORD.read_text("utf-8"))["faults"] if RECORD.exists() else []
    rows = {row["fault"]: row for row in [*known, {**new, "commit": head["commit"]}]}
    titles = [kind.title for kind in KINDS.values()]
    content = {**head, "faults": [rows[title] for title in titles if title in rows]}
    RECORD.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def row(kind: str, tries: list[Try]) -> dict[str, Any]:
    ends = [one.end for one in tries]
    return {
        "fault": KINDS[kind].title,
        "tried": len(tries),
        "refused": ends.count(REFUSED),
        "result": ends.count(RESULT),
        "seconds": round(max(one.seconds for one in tries), 1),
        "mib": round(max(one.mib for one in tries)),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_has_enough_of_each_kind(kind: str) -> None:
    rows = {row["fault"]: row for row in json.loads(RECORD.read_text("utf-8"))["faults"]}
    found = rows[KINDS[kind].title]
    assert found["tried"] == KINDS[kind].full == found["refused"] + found["result"]
    # a kill or a full disk is several runs of the command
    assert found["seconds"] <= 10 or " " in kind
    assert found["mib"] <= 1536
