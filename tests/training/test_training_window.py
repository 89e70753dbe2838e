"""Training on windows around the defects, and what generation makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dualdiff_engine import DataError, Engine, Placement, SettingsError, adapters
from dualdiff_engine.cli.main import main
from dualdiff_engine.training import train_adapter
from dualdiff_engine.training.data import find_examples, sheet_backgrounds
from training_cases import base_of, mask_of, options_of, picture_of, save, write_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holes of 16 x 10 pixels, at 24, 20 + 3 n of pictures of 64 x 64."""
    return write_data(tmp_path_factory.mktemp("data"))


def test_picture_mask_and_object_are_cut_equally(data: Path) -> None:
    options = options_of(window=2.0, background=True, sample_every=1)
    examples = find_examples(data, options)
    for index, example in enumerate(examples):
        window = example.window
        assert window is not None
        assert (window.left, window.top) == (16, 9 + 3 * index)
        assert (window.width, window.height) == (32, 32)
        picture, mask, around = (
            np.asarray(Image.open(path))[window.slices]
            for path in (
                picture_of(data, index),
                mask_of(data, index),
                mask_of(data, index, "object_mask"),
            )
        )
        assert np.array_equal(example.image(32), picture)
        assert np.array_equal(example.anomaly(32), np.where(mask[..., None] > 0, picture, 0))
        rest = np.where(around[..., None] > 0, 0, picture)
        assert np.array_equal(example.surroundings(32), rest)
        # of sheets too: good parts have no defect to cut a window around
        assert np.array_equal(sheet_backgrounds(data, examples, options)[index].picture, rest)
    assert examples[0].image(64).shape == (64, 64, 3)


def test_without_window_examples_are_whole_pictures(data: Path) -> None:
    for example in find_examples(data, options_of()):
        assert example.window is None
        assert np.array_equal(example.image(64), np.asarray(Image.open(example.picture)))


def test_a_window_that_does_not_fit_has_its_line(tmp_path: Path) -> None:
    root = write_data(tmp_path)
    large = np.zeros((64, 64), np.uint8)
    large[2:62, 10:20] = 255
    save(mask_of(root, 1), large)
    with pytest.raises(DataError) as caught:
        find_examples(root, options_of(window=3.0))
    assert str(caught.value).splitlines()[1:] == [
        f"{mask_of(root, 1)}: a window of 3 times the defect is 180 x 180 pixels, larger than its "
        "picture (64 x 64): pass at most 1.06"
    ]


@pytest.mark.parametrize("window", [0.5, float("nan"), "auto", 1001])
def test_wrong_windows(window: Any) -> None:
    with pytest.raises(SettingsError, match="window must be"):
        options_of(window=window)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = options_of(window=2.5, steps=2)
    result = train_adapter(base_of(False), data, tmp_path_factory.mktemp("run"), options)
    assert result.adapter is not None
    return result.adapter


def test_the_ratio_is_recorded(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert json.loads((trained.parent / "training.json").read_text())["options"]["window"] == 2.5
    loaded = adapters.load(trained)
    assert loaded.window == 2.5
    assert adapters.convert(trained, tmp_path / "same.safetensors").window == 2.5
    assert adapters.load(tmp_path / "same.safetensors").sha256 == loaded.sha256
    assert main(["inspect", str(trained)]) == 0
    assert re.search(r"^window +2\.5$", capsys.readouterr().out, re.MULTILINE)
    again = train_adapter(base_of(False), data, tmp_path / "again", options_of(window=2.5, steps=2))
    assert again.adapter is not None
    assert again.adapter.read_bytes() == trained.read_bytes()


@pytest.mark.parametrize("value", ["0.1", "nan", "large", ""])
def test_a_ratio_that_cannot_be_is_not_known(trained: Path, tmp_path: Path, value: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file(load_file(trained), path, {"dualdiff_window": value})
    assert adapters.load(path).window is None


def test_auto_is_the_ratio_of_training(trained: Path) -> None:
    whole = np.random.default_rng(0).integers(1, 255, (200, 300, 3), dtype=np.uint8)
    region = np.zeros((200, 300), np.uint8)
    region[100:120, 200:220] = 255
    quick: dict[str, Any] = {"seeds": [1], "steps": 2, "size": 64}
    with Engine.from_pretrained(base_of(False), adapter=trained) as engine:

        def drawn(**options: Any) -> Any:
            own = Placement(whole, region, **options)
            (pair,) = engine.generate(placement=own, **quick)
            return pair

        auto, same = drawn(window="auto"), drawn(window=2.5)
        # an edge of 2 latent pixels of 8 needs a window of 64 / (64 - 32) times the region
        assert auto.recipe["window"]["box"] == [185, 85, 50, 50]
        assert auto.recipe["placement"]["window"] == 2.5
        assert np.array_equal(np.asarray(auto.image), np.asarray(same.image))
        assert drawn(window="auto", edge=3).recipe["placement"]["window"] == 4
        # without a window, a defect of 20 pixels in 300 is too small to draw at all
        with pytest.raises(SettingsError, match="smaller than a latent pixel"):
            drawn()
