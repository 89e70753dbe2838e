"""examples/bundle.py, on an export of the model that ships."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "bundle.py"


def test_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT))["main"](tmp_path, steps=2)
    assert {path.name for path in tmp_path.glob("*.png")} == {"fabric-hole.png", "fabric-stain.png"}
    assert "fabric-stain/denoiser: error " in capsys.readouterr().out
