"""The scripts in examples/ run on the model that ships and write what they say."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "examples"
# quick, and still a multiple of what the VAE shrinks
FEW: dict[str, Any] = {"steps": 2, "size": 64}


def run(name: str, out: Path, **options: Any) -> None:
    runpy.run_path(str(FOLDER / f"{name}.py"))["main"](out, **options)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pairs", tmp_path, **FEW)
    assert capsys.readouterr().out.splitlines()[3].startswith(f"{tmp_path}/image/00003.png  seed 3")
    names = [f"{n:05d}.png" for n in range(4)]
    for kind in ("image", "anomaly", "mask"):
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == names
    assert pixels(tmp_path / "image/00000.png").shape == (64, 64, 3)


def test_adapter_switch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("adapter_switch", tmp_path, **FEW)
    hole, stain = (pixels(tmp_path / f"fabric-{defect}.png") for defect in ("hole", "stain"))
    assert not np.array_equal(hole, stain)
    assert "fabric/stain: " in capsys.readouterr().out


def test_background(tmp_path: Path) -> None:
    run("background", tmp_path, **FEW)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{n}{end}.png" for n in range(3) for end in ("", "_mask")}
    assert set(np.unique(pixels(tmp_path / "0_mask.png"))) <= {0, 255}


def test_placement(tmp_path: Path) -> None:
    run("placement", tmp_path, **FEW)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{n}{end}.png" for n in range(8) for end in ("", "_mask")} | {"sheet.png"}
    assert pixels(tmp_path / "sheet.png").shape == (5 * 64 + 4 * 4, 8 * 64 + 7 * 4, 3)


def test_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("callback", tmp_path, **FEW)
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    # two of the first pair, and the one after which the second stopped
    assert [line.split(":")[0] for line in steps] == ["step 0", "step 1", "step 0"]
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


def test_all_are_run_and_short() -> None:
    scripts = {path.stem: path.read_text("utf-8") for path in FOLDER.glob("*.py")}
    # the bundle's needs an export: tests/export/test_example.py; a server: test_serve_fastapi.py
    names = {"pairs", "placement", "adapter_switch", "background", "callback", "bundle"}
    names.add("serve_fastapi")
    assert scripts.keys() == names
    assert all(source.count("\n") <= 40 for source in scripts.values())
