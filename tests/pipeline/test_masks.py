"""Masks: threshold extractor on synthetic pictures with known truth, and the ONNX segmenter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, save_model

from dualdiff_engine.bench.synthetic_masks import (
    FAMILIES,
    intersection_over_union,
    main,
    make_sample,
    score,
)
from dualdiff_engine.errors import SegmenterError, SettingsError
from dualdiff_engine.pipeline.masks import Segmenter, extract_mask

Picture = NDArray[np.uint8]

# the extractor was developed on seed 0
UNSEEN_SEED = 2024


def black(height: int = 256, width: int = 256) -> Picture:
    return np.zeros((height, width, 3), np.uint8)


def noise_only(deviation: float, size: int = 256) -> Picture:
    noise = np.random.default_rng(3).normal(4, deviation, (size, size, 3))
    return np.clip(np.rint(noise), 0, 255).astype(np.uint8)


def square() -> tuple[Picture, Picture]:
    """A white square on black, and its mask."""
    picture = black(96, 128)
    picture[24:72, 32:96] = 255
    return picture, np.ascontiguousarray(picture[..., 0])


class TestExtractMask:
    def test_overlap_on_every_family(self) -> None:
        rows = score(count_per_family=3, seed=UNSEEN_SEED)
        assert {row["family"] for row in rows} == set(FAMILIES)
        assert np.mean([row["mean_iou"] for row in rows]) >= 0.95
        for family in FAMILIES:
            overlaps = [row["mean_iou"] for row in rows if row["family"] == family]
            assert np.mean(overlaps) >= 0.93, family

    @pytest.mark.parametrize("family", FAMILIES)
    def test_result_describes_its_mask(self, family: str) -> None:
        result = extract_mask(make_sample(family, 256, UNSEEN_SEED).picture)
        assert result.mask.shape == (256, 256)
        assert result.mask.dtype == np.uint8
        assert set(np.unique(result.mask)) == {0, 255}
        assert result.area == np.mean(result.mask == 255)
        assert 0 < result.threshold < 255
        assert result.empty is False

    def test_report_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        report = tmp_path / "masks.json"
        monkeypatch.setattr(sys, "argv", ["masks", "--count", "1", "--output-json", str(report)])
        main()
        rows = json.loads(report.read_text())["rows"]
        assert rows[0].keys() == {"family", "size", "n", "mean_iou", "p10_iou", "empty"}

    def test_samples_are_reproducible(self) -> None:
        first, again = (make_sample("multi", 256, UNSEEN_SEED) for _ in range(2))
        np.testing.assert_array_equal(first.picture, again.picture)
        np.testing.assert_array_equal(first.mask, again.mask)

    @pytest.mark.parametrize("deviation", [0.0, 0.5, 2.0, 6.0, 12.0, 25.0])
    def test_nothing_but_noise_is_empty(self, deviation: float) -> None:
        # without a limit to the area not a single pixel may pass
        result = extract_mask(noise_only(deviation), min_area=0)
        assert result.empty
        assert result.area == 0
        assert not result.mask.any()

    def test_black_is_empty(self) -> None:
        result = extract_mask(black())
        assert result.empty
        assert not result.mask.any()

    @pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 60)])
    def test_one_channel_is_enough(self, colour: tuple[int, int, int]) -> None:
        picture, truth = square()
        picture[truth > 0] = colour
        np.testing.assert_array_equal(extract_mask(picture).mask, truth)

    def test_specks_are_dropped_and_min_area_moves_the_limit(self) -> None:
        picture, truth = square()
        picture[5:7, 5:7] = 255
        np.testing.assert_array_equal(extract_mask(picture, min_area=1e-3).mask, truth)
        assert extract_mask(picture, min_area=0).mask[5, 5] == 255
        assert extract_mask(picture, min_area=0.9).empty

    @pytest.mark.parametrize(("outer", "inner"), [(60, 40), (15, 8), (100, 20)])
    def test_ring_keeps_its_hole(self, outer: int, inner: int) -> None:
        picture, centre = black(512, 512), (256, 256)
        cv2.circle(picture, centre, outer, (200, 200, 200), -1)
        cv2.circle(picture, centre, inner, (0, 0, 0), -1)
        mask = extract_mask(picture).mask
        assert mask[256, 256] == 0
        assert intersection_over_union(mask, np.where(picture[..., 0], 255, 0)) > 0.95

    def test_dark_spots_inside_are_filled(self) -> None:
        picture, truth = black(), np.zeros((256, 256), np.uint8)
        picture[60:180, 60:180], truth[60:180, 60:180] = 255, 255
        picture[90:99, 90:99] = 0
        picture[150, 120] = 0
        np.testing.assert_array_equal(extract_mask(picture).mask, truth)

    def test_gap_between_crossing_scratches_stays_open(self) -> None:
        picture = black()
        for start, end in (
            ((40, 100), (220, 100)),
            ((80, 60), (140, 200)),
            ((170, 60), (110, 200)),
        ):
            cv2.line(picture, start, end, (180, 180, 180), 4)
        assert extract_mask(picture).mask[120, 125] == 0

    @pytest.mark.parametrize("covered", [0.6, 0.95, 1.0])
    def test_defect_larger_than_the_background(self, covered: float) -> None:
        picture = noise_only(2.0)
        truth = np.zeros((256, 256), np.uint8)
        rows = round(256 * covered)
        picture[:rows], truth[:rows] = 255, 255
        np.testing.assert_array_equal(extract_mask(picture).mask, truth)

    @pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 300)])
    def test_any_size_works(self, shape: tuple[int, int]) -> None:
        assert extract_mask(black(*shape)).empty
        assert extract_mask(black(*shape) + np.uint8(200)).area == 1

    def test_reversed_and_read_only_pictures_work(self) -> None:
        picture, truth = square()
        picture.setflags(write=False)
        np.testing.assert_array_equal(extract_mask(picture[..., ::-1]).mask, truth)

    @pytest.mark.parametrize(
        "picture",
        [
            black().astype(np.float32),
            black()[..., 0],
            np.zeros((8, 8, 4), np.uint8),
            np.zeros((0, 8, 3), np.uint8),
            [[0]],
        ],
        ids=["float", "grey", "rgba", "no-pixels", "list"],
    )
    def test_bad_picture(self, picture: Picture) -> None:
        with pytest.raises(SettingsError, match=r"anomaly picture .* pass"):
            extract_mask(picture)

    @pytest.mark.parametrize("min_area", [-0.1, 1.0, float("nan")])
    def test_bad_min_area(self, min_area: float) -> None:
        with pytest.raises(SettingsError, match="min_area"):
            extract_mask(black(), min_area=min_area)


def write_model(
    path: Path,
    *,
    shape: tuple[int | str, ...] = (1, 3, "height", "width"),
    kind: int = TensorProto.FLOAT,
    last: str = "Sigmoid",
    keepdims: int = 1,
    axis: int = 1,
    inputs: int = 1,
) -> Path:
    """A model whose logit is the largest channel of its (normalised) input."""
    values = [helper.make_tensor_value_info(f"picture{i}", kind, shape) for i in range(inputs)]
    nodes = [
        helper.make_node("ReduceMax", ["picture0"], ["logit"], axes=[axis], keepdims=keepdims),
        helper.make_node(last, ["logit"], ["saliency"]),
    ]
    output_kind = TensorProto.INT64 if last == "Shape" else kind
    output = helper.make_tensor_value_info("saliency", output_kind, None)
    graph = helper.make_graph(nodes, "tiny", values, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    save_model(model, path)
    return path


class TestSegmenter:
    @pytest.mark.parametrize("last", ["Sigmoid", "Identity"])
    @pytest.mark.parametrize("keepdims", [0, 1])
    @pytest.mark.parametrize(
        "shape", [(1, 3, 96, 128), (1, 3, 64, 64), ("n", 3, "h", "w"), (1, 3, 320, "w")]
    )
    def test_finds_the_defect(
        self, tmp_path: Path, shape: tuple[int | str, ...], keepdims: int, last: str
    ) -> None:
        path = write_model(tmp_path / "net.onnx", shape=shape, keepdims=keepdims, last=last)
        picture, truth = square()
        result = Segmenter(path)(picture)
        assert result.mask.shape == truth.shape
        assert set(np.unique(result.mask)) == {0, 255}
        assert intersection_over_union(result.mask, truth) > 0.93
        assert result.threshold == 0.5
        assert result.area == np.mean(result.mask == 255)

    def test_logits_and_probabilities_agree(self, tmp_path: Path) -> None:
        ramp = np.ascontiguousarray(np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 64, 256)).T)
        logits = Segmenter(write_model(tmp_path / "logits.onnx", last="Identity"))(ramp)
        probabilities = Segmenter(write_model(tmp_path / "net.onnx", last="Sigmoid"))(ramp)
        np.testing.assert_array_equal(logits.mask, probabilities.mask)

    def test_black_is_empty(self, tmp_path: Path) -> None:
        assert Segmenter(write_model(tmp_path / "net.onnx"))(black(50, 70)).empty

    def test_bad_picture(self, tmp_path: Path) -> None:
        segmenter = Segmenter(write_model(tmp_path / "net.onnx"))
        with pytest.raises(SettingsError, match="uint8"):
            segmenter(black().astype(np.float32))

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(SegmenterError, match=r"none\.onnx: no such file"):
            Segmenter(tmp_path / "none.onnx")

    @pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08" + bytes(100)])
    def test_damaged_file(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "net.onnx"
        path.write_bytes(content)
        with pytest.raises(SegmenterError, match=r"net\.onnx: not a usable ONNX model") as error:
            Segmenter(path)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(
        "misfit",
        [
            {"shape": (1, 1, 64, 64)},
            {"shape": (4, 3, 64, 64)},
            {"shape": (3, 64, 64)},
            {"kind": TensorProto.DOUBLE},
            {"inputs": 2},
        ],
        ids=["grey", "batch", "rank", "double", "two"],
    )
    def test_wrong_inputs(self, tmp_path: Path, misfit: dict[str, Any]) -> None:
        path = write_model(tmp_path / "net.onnx", **misfit)
        with pytest.raises(SegmenterError, match=r"net\.onnx: its inputs are .* export"):
            Segmenter(path)

    @pytest.mark.parametrize("misfit", [{"axis": 0}, {"last": "Shape"}], ids=["shape", "kind"])
    def test_wrong_output(self, tmp_path: Path, misfit: dict[str, Any]) -> None:
        path = write_model(tmp_path / "net.onnx", **misfit)
        with pytest.raises(SegmenterError, match=r"net\.onnx: its first output is .* export"):
            Segmenter(path)

    def test_output_that_is_not_finite(self, tmp_path: Path) -> None:
        # the logit of a black picture is negative, and its logarithm is NaN
        path = write_model(tmp_path / "net.onnx", last="Log")
        with pytest.raises(SegmenterError, match=r"net\.onnx: its output holds NaN"):
            Segmenter(path)

    def test_missing_runtime(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(SegmenterError, match=r"pip install dualdiff-engine\[segment\]"):
            Segmenter(write_model(tmp_path / "net.onnx"))
