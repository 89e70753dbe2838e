"""Kernels compiled ahead of time, without a GPU, use no more than the committed budget."""

from __future__ import annotations

import json

import pytest

from dualdiff_engine.bench import aot
from dualdiff_engine.ops.triton import OPS


@pytest.mark.parametrize("module", sorted(set(OPS.values())))
def test_budget(module: str) -> None:
    found = aot.measure([op for op, home in OPS.items() if home == module])
    print(aot.table(found))
    budget = json.loads(aot.BUDGET.read_text("utf-8"))
    mine = {name: usage for name, usage in budget.items() if name.split()[0] in (module, *OPS)}
    own = {name: mine[name] for name in mine if name in found or name.split()[0] == module}
    assert not aot.worse(found, own)
    # defaults never spill
    assert all(usage["spills"] == 0 for usage in found.values())
