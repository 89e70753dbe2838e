"""Seeded faults in a base model folder: each ends in a picture or in one line, and none hangs.

`DUALDIFF_MUTATED_BASES=300` tries more of them.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine import Engine, adapters
from dualdiff_engine.errors import DualDiffError
from hostile_bases import base_copy, mutate
from support import DATA

COUNT = int(os.environ.get("DUALDIFF_MUTATED_BASES", "60"))
# of a network that draws in a second; a machine that others use may need ten times that
SECONDS = 30


@pytest.fixture(scope="module")
def adapter() -> adapters.Adapter:
    return adapters.load(DATA / "dual/adapter", allow_pickle=True)


def hang(*_: Any) -> None:
    raise TimeoutError(f"no outcome in {SECONDS} s")


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs an alarm that stops a hang")
@pytest.mark.parametrize("seed", range(COUNT))
def test_a_fault_ends_in_a_pair_or_in_one_line(
    tmp_path: Path, seed: int, adapter: adapters.Adapter, record_property: Any
) -> None:
    base = base_copy(tmp_path)
    record_property("fault", mutate(base, seed))
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    outcome = "a pair"
    try:
        with Engine.from_pretrained(base) as engine:
            engine.keep_adapter(adapter, "adapter")
            assert len(engine.generate(seeds=[3], steps=1, size=32)) == 1
    except DualDiffError as error:
        outcome = str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    record_property("outcome", outcome)
    assert "\n" not in outcome
