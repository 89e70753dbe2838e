"""The main job on a photograph, as a user runs it; and the sheet that the README shows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data, draw

from dualdiff_engine import cli
from dualdiff_engine.bench.sheet import sheet
from support import DATA


def test_pairs_on_a_photograph(tmp_path: Path) -> None:
    photograph = data.coffee()
    mask = np.zeros(photograph.shape[:2], np.uint8)
    # the cup, seen from above
    mask[draw.ellipse(185, 300, 160, 190, mask.shape)] = 255
    Image.fromarray(photograph).save(tmp_path / "cup.png")
    Image.fromarray(mask).save(tmp_path / "cup_mask.png")
    arguments = {
        "--base": DATA / "bcm/model",
        "--adapter": DATA / "bcm/adapter",
        "--background": tmp_path / "cup.png",
        "--object-mask": tmp_path / "cup_mask.png",
        "--out": tmp_path / "run",
        "--count": 4,
        "--seed": 0,
        "--steps": 10,
        "--size": 128,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    assert cli.main(["generate", *words, "--allow-pickle", "--quiet"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/manifest.jsonl").open()]
    assert [row["seed"] for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert row["recipe"]["background"]["noise"] == "fresh"
        pictures = {kind: Image.open(tmp_path / "run" / f) for kind, f in row["files"].items()}
        assert {kind: picture.mode for kind, picture in pictures.items()} == {
            "image": "RGB",
            "anomaly": "RGB",
            "mask": "L",
        }
        assert {picture.size for picture in pictures.values()} == {(128, 128)}
        # a picture, not a flat or broken one
        assert np.asarray(pictures["image"]).std() > 5
        assert set(np.unique(np.asarray(pictures["mask"]))) <= {0, 255}
    assert sheet(tmp_path / "run").size == (4 * 132 - 4, 3 * 132 - 4)
