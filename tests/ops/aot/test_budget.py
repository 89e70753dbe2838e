"""Kernels compiled ahead of time, without a GPU, use no more than the committed budget."""

from __future__ import annotations

import json

import pytest

from dualdiff_engine.bench.gpu import aot, static
from dualdiff_engine.ops.triton import MODULES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_budget(module: str) -> None:
    found = aot.measure([module])
    print(aot.table(found))
    budget = json.loads(aot.BUDGET.read_text("utf-8"))
    own = {name: usage for name, usage in budget.items() if name.split()[0] == module}
    assert not aot.worse(found, own)
    # defaults never spill
    assert all(usage["spills"] == 0 for usage in found.values())
    # of the same machine code, which Triton's cache holds by now
    bounds = static.measure([module])
    table = json.loads(static.STATIC.read_text("utf-8"))
    complaints = static.worse(bounds, {k: v for k, v in table.items() if k.split()[0] == module})
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"guided_step", "composed_exchange"}))
def test_candidates_of_tuning_can_win(module: str) -> None:
    listed = aot.candidates(module)
    assert len(listed) > 3
    complaints = aot.unfit(listed)
    assert not complaints, "\n".join(complaints)


def test_a_change_for_the_worse_is_named() -> None:
    usage = {"registers": 100, "spills": 0, "shared": 1024, "tensor_cores": True}
    worse = {**usage, "registers": 128, "spills": 8}
    assert aot.worse({"a": usage}, {"a": usage}) == []
    assert aot.worse({"a": worse}, {"a": usage}) == ["a: registers 128 > 100", "a: spills 8 > 0"]
    assert aot.worse({"a": usage}, {}) == ["a: not in the budget"]
    assert aot.worse({}, {"a": usage}) == ["a: in the budget, gone"]
