"""The upsampling bench runs and records both forms."""

from __future__ import annotations

import json
from pathlib import Path

from dualdiff_engine.bench import upsampling


def test_both_forms_are_timed(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    upsampling.main(["--rounds", "1", "--output-json", str(file)])
    record = json.loads(file.read_text())
    assert record["ratio"] == record["median_s"]["two_steps"] / record["median_s"]["folded"]
