"""Jobs for tests of the dataset factory, and what their folders hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset import job_file, layout
from dualdiff_engine.dataset.job import Job
from dualdiff_engine.dataset.rows import parts_of, rows_of

DATA = Path(__file__).parent.parent / "data" / "dual"


def tiny_job(out: Path, pairs: int = 6, **changes: Any) -> Job:
    """Two defects of the tiny golden model."""
    defect = {"product": "p", "adapter": str(DATA / "adapter"), "pairs": pairs}
    content: dict[str, Any] = {
        "base": str(DATA / "model"),
        "out": str(out),
        "defects": [{**defect, "defect": "a"}, {**defect, "defect": "b"}],
        "sampling": {"steps": 2, "size": 64},
        "engine": {"allow_pickle": True, "device": "cpu"},
        # masks of networks that learnt nothing mean nothing
        "gates": {"empty": "record", "full": "record"},
    }
    return job_file.parse({**content, **changes})


def rows(root: Path) -> list[dict[str, Any]]:
    """All rows, in no order."""
    return [row for part in parts_of(root) for row in rows_of(part)]


def accepted(root: Path) -> list[str]:
    """Keys of the rows of accepted pairs, sorted."""
    return sorted(row["key"] for row in rows(root) if row["verdict"] == "accepted")


def contents(root: Path) -> dict[str, str]:
    """File of the store -> hash of its bytes."""
    store = root / layout.STORE
    files = [path for path in store.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def stub(monkeypatch: Any, **how: Any) -> None:
    """Tell the stub painter what goes wrong."""
    monkeypatch.setenv("DUALDIFF_STUB", json.dumps(how))
