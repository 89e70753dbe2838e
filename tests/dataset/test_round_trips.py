"""Formats by libraries, read again by libraries: rings, rings in rings, many parts, pixels."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.folder_entries import folder_entries
from dualdiff_engine.dataset.formats import FORMATS, export, shards
from dualdiff_engine.errors import SettingsError
from format_cases import flags, iou, names_in, write_good, write_run

KINDS = ["ring", "rings", "parts", "blob", "specks"]
NEEDING = [form for form, kind in FORMATS.items() if kind.needs]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "bottle" / "broken", KINDS)
    write_run(root / "screw" / "scratch", KINDS, first=1)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("good")
    return {name: write_good(root / name) for name in ("bottle", "screw")}


def name_of(entry: Entry) -> str:
    return f"{entry.product}-{entry.defect}-{entry.number:06d}"


def test_coco_is_exact(runs: Path, good: Any, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    export(folder_entries(runs), "coco", tmp_path / "out", good=good)
    entries = {name_of(entry): entry for entry in folder_entries(runs)}
    for split in ("train", "val"):
        found = coco.COCO(str(tmp_path / f"out/annotations/instances_{split}.json"))
        assert [found.cats[n]["name"] for n in (1, 2)] == ["bottle/broken", "screw/scratch"]
        for number, row in found.imgs.items():
            assert (tmp_path / "out" / split / row["file_name"]).is_file()
            objects = found.imgToAnns[number]
            entry = entries.pop(Path(row["file_name"]).stem, None)
            if entry is None:
                assert "-good-" in row["file_name"]
                assert not objects
                continue
            mask = flags(entry.mask)
            assert (row["height"], row["width"]) == mask.shape
            drawn = [found.annToMask(one) > 0 for one in objects]
            assert np.array_equal(np.any(drawn, axis=0), mask)
            assert len(drawn) == cv2.connectedComponents(mask.astype(np.uint8))[0] - 1
            assert {one["category_id"] for one in objects} == {
                1 if entry.product == "bottle" else 2
            }
            for one, part in zip(objects, drawn, strict=True):
                left, top, width, height = one["bbox"]
                assert part[top : top + height, left : left + width].sum() == one["area"]
                assert one["area"] == part.sum()
    assert not entries


def test_yolo_keeps_holes_and_parts(runs: Path, good: Any, tmp_path: Path) -> None:
    supervision = pytest.importorskip("supervision")
    out = tmp_path / "out"
    export(folder_entries(runs), "yolo", out, good=good)
    entries = {name_of(entry): entry for entry in folder_entries(runs)}
    for split in ("train", "val"):
        read = supervision.DetectionDataset.from_yolo(
            str(out / "images" / split),
            str(out / "labels" / split),
            str(out / "data.yaml"),
            force_masks=True,
        )
        assert read.classes == ["bottle/broken", "screw/scratch"]
        for path, _, found in read:
            entry = entries.pop(Path(path).stem, None)
            if entry is None:
                # without the file Ultralytics would warn; an empty one is a normal picture
                assert (out / "labels" / split / f"{Path(path).stem}.txt").read_text() == ""
                assert len(found) == 0
                continue
            assert set(found.class_id) == {0 if entry.product == "bottle" else 1}
            mask, drawn = flags(entry.mask), found.mask.any(axis=0)
            if entry.number == KINDS.index("specks"):
                # a pixel becomes four
                assert (drawn | ~mask).all()
                continue
            assert iou(drawn, mask) >= 0.99
    assert not entries
    for label in (out / "labels").rglob("*.txt"):
        # no line is a box, which a file of outlines may not hold
        assert all(len(line.split()) >= 7 for line in label.read_text().splitlines())


def test_webdataset_is_exact(
    runs: Path, good: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    webdataset = pytest.importorskip("webdataset")
    monkeypatch.setattr(shards.write, "__defaults__", (6,))
    for out in ("one", "two"):
        export(folder_entries(runs), "webdataset", tmp_path / out, good=good)
    names = names_in(tmp_path / "one")
    assert names == {*(f"train-00000{n}.tar" for n in range(3)), "val-000000.tar"}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    entries = {name_of(entry): entry for entry in folder_entries(runs)}
    normal = 0
    for name in sorted(names):
        read = webdataset.WebDataset(str(tmp_path / "one" / name), shardshuffle=False)
        for sample in read.decode("pil"):
            entry = entries.pop(sample["__key__"], None)
            mask = np.asarray(sample["mask.png"].convert("L"))
            if entry is None:
                assert sample["json"]["defect"] == "good"
                assert not mask.any()
                normal += 1
                continue
            assert np.array_equal(mask > 127, flags(entry.mask))
            image = np.asarray(Image.open(entry.image))
            assert np.array_equal(np.asarray(sample["image.png"]), image)
            assert sample["json"]["score_contrast"] == entry.scores["contrast"]
    assert not entries
    assert normal == 10
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as shard:
        assert {member.mtime for member in shard} == {0}


@pytest.mark.parametrize("form", NEEDING)
def test_a_missing_package_is_said_first(
    runs: Path, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (package,) = FORMATS[form].needs
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError, match=f"{form} needs {package}") as caught:
        export(iter(()), form, tmp_path / "out")
    assert str(caught.value).endswith("pip install 'dualdiff-engine[formats]'")
    assert "\n" not in str(caught.value)


def test_imagefolder_is_read(runs: Path, good: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(folder_entries(runs), "imagefolder", tmp_path / "out", good=good)
    read = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    assert {split: len(rows) for split, rows in read.items()} == {"train": 16, "validation": 4}
    entries = {(e.product, e.defect, e.number): e for e in folder_entries(runs)}
    for row in (row for rows in read.values() for row in rows):
        entry = entries.pop((row["product"], row["defect"], row["number"]), None)
        mask = np.asarray(row["mask"].convert("L")) > 127
        if entry is None:
            assert not mask.any()
            continue
        assert np.array_equal(mask, flags(entry.mask))
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(entry.image)))
    assert not entries


def test_json_is_plain(runs: Path, good: Any, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    export(folder_entries(runs), "coco", tmp_path / "out", good=good)
    content = json.loads((tmp_path / "out/annotations/instances_train.json").read_text())
    assert content.keys() == {"categories", "images", "annotations"}
