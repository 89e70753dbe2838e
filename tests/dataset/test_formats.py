"""Formats: what is written is what was drawn, whole, and under names that readers take."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine.cli.export_dataset import FORMS
from dualdiff_engine.cli.main import main
from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.folder_entries import folder_entries
from dualdiff_engine.dataset.formats import FORMATS, export
from dualdiff_engine.dataset.formats.names import slug
from dualdiff_engine.dataset.formats.tree import held_out
from dualdiff_engine.errors import DataError, OutputError, SettingsError
from format_cases import flags, names_in, same_pixels, write_good, write_run

KINDS = ["ring", "rings", "parts", "blob", "blob"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "bottle" / "broken", KINDS)
    write_run(root / "bottle" / "scratch", KINDS[:2], first=1)
    write_run(root / "screw" / "scratch", KINDS[2:], first=2)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    root = tmp_path_factory.mktemp("good")
    return {name: write_good(root / name) for name in ("bottle", "screw")}


def exported(runs: Path, form: str, out: Path, good: Any, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = export(folder_entries(runs), form, out, good=good, **options)
    assert (done.pairs, done.good, done.left_out) == (10, 10, 0)
    assert not list(out.parent.glob("*.partial"))
    return out


def test_mvtec(runs: Path, good: Any, tmp_path: Path) -> None:
    out = exported(runs, "mvtec", tmp_path / "out", good, held=0.4)
    numbers = [f"{n:06d}" for n in range(5)]
    assert names_in(out / "bottle") == {
        *(f"train/good/{n}.png" for n in numbers[:3]),
        *(f"test/good/{n}.png" for n in numbers[:2]),
        *(f"test/broken/{n}.png" for n in numbers),
        *(f"ground_truth/broken/{n}_mask.png" for n in numbers),
        *(f"test/scratch/{n}.png" for n in numbers[:2]),
        *(f"ground_truth/scratch/{n}_mask.png" for n in numbers[:2]),
    }
    for entry in folder_entries(runs):
        folder, name = out / entry.product, f"{entry.defect}/{entry.number:06d}"
        assert (folder / f"test/{name}.png").read_bytes() == entry.image.read_bytes()
        mask = Image.open(folder / f"ground_truth/{name}_mask.png")
        assert mask.mode == "L"
        assert set(np.unique(np.asarray(mask))) == {0, 255}
        assert np.array_equal(np.asarray(mask) > 0, flags(entry.mask))


def test_normal_pictures_are_all_there_and_are_files(runs: Path, good: Any, tmp_path: Path) -> None:
    # anomalib silently drops links that lead out of the tree
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in good["bottle"]:
        (linked / path.name).symlink_to(path)
    mine = {**good, "bottle": sorted(linked.iterdir())}
    out = exported(runs, "mvtec", tmp_path / "out", mine)
    written = [*(out / "bottle/train/good").iterdir(), *(out / "bottle/test/good").iterdir()]
    assert len(written) == 5
    assert not any(path.is_symlink() for path in written)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    for path in good["bottle"]:
        assert any(same_pixels(path, other) for other in written)


def test_imagefolder(runs: Path, good: Any, tmp_path: Path) -> None:
    out = exported(runs, "imagefolder", tmp_path / "out", good)
    rows = [
        (split, json.loads(line))
        for split in ("train", "validation")
        for line in (out / split / "metadata.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 20
    assert len({tuple(row) for _, row in rows}) == 1, "every row has the same fields"
    entries = {(e.product, e.defect, e.number): e for e in folder_entries(runs)}
    for split, row in rows:
        image, mask = (out / split / row[name] for name in ("file_name", "mask_file_name"))
        if row["defect"] == "good":
            assert not flags(mask).any()
            continue
        entry = entries.pop((row["product"], row["defect"], row["number"]))
        assert same_pixels(image, entry.image)
        assert np.array_equal(flags(mask), flags(entry.mask))
        assert row["score_contrast"] == entry.scores["contrast"]
    assert not entries


def test_no_column_of_a_split_is_without_values(tmp_path: Path) -> None:
    # datasets takes types from values, and refuses splits of different types
    run = write_run(tmp_path / "run", ["ring"])
    normal = {"p": write_good(tmp_path / "good")}
    export(folder_entries(run, "p"), "imagefolder", tmp_path / "out", good=normal, held=0.4)
    for split, count in (("train", 4), ("validation", 2)):
        text = (tmp_path / "out" / split / "metadata.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        assert all(any(row[name] is not None for row in rows) for name in rows[0])


def test_mvtec_ad2(runs: Path, good: Any, tmp_path: Path) -> None:
    out = exported(runs, "mvtec-ad2", tmp_path / "out", good, held=0.6)
    names = [f"{n:06d}_broken" for n in range(5)] + ["000005_scratch", "000006_scratch"]
    assert names_in(out / "bottle") == {
        *(f"train/good/00000{n}.png" for n in range(2)),
        "validation/good/000000.png",
        *(f"test_public/good/00000{n}.png" for n in range(2)),
        *(f"test_public/bad/{name}.png" for name in names),
        *(f"test_public/ground_truth/bad/{name}_mask.png" for name in names),
    }
    entries = [e for e in folder_entries(runs) if e.product == "bottle"]
    for name, entry in zip(names, entries, strict=True):
        assert same_pixels(out / f"bottle/test_public/bad/{name}.png", entry.image)
        mask = out / f"bottle/test_public/ground_truth/bad/{name}_mask.png"
        assert np.array_equal(flags(mask), flags(entry.mask))


def test_loco(runs: Path, good: Any, tmp_path: Path) -> None:
    out = exported(runs, "loco", tmp_path / "out", good, held=0.6)
    assert len(names_in(out / "screw")) == 5 + 2 * 3
    for entry in folder_entries(runs):
        folder, name = out / entry.product, f"{entry.defect}/{entry.number:06d}"
        assert same_pixels(folder / f"test/{name}.png", entry.image)
        assert np.array_equal(flags(folder / f"ground_truth/{name}/000.png"), flags(entry.mask))


@pytest.mark.parametrize(
    ("form", "name"),
    [("papers", "1.png"), ("papers-anomalydiffusion", "1.jpg"), ("papers-seas", "001.png")],
)
@pytest.mark.filterwarnings("ignore:no normal pictures")
def test_papers(runs: Path, tmp_path: Path, form: str, name: str) -> None:
    entries = [e for e in folder_entries(runs) if e.number != 1]
    if form == "papers-seas":
        with pytest.warns(UserWarning, match="seas reads 1000"):
            export(entries, form, tmp_path / "out")
    else:
        export(entries, form, tmp_path / "out")
    folder = tmp_path / "out/bottle/broken"
    # without the gap that pair 1 leaves
    assert len(names_in(folder)) == 8
    assert sorted(path.name for path in folder.iterdir()) == ["image", "mask"]
    second = next(e for e in entries if e.number == 2)
    assert np.array_equal(flags(folder / "mask" / name), flags(second.mask))
    image = np.asarray(Image.open(folder / "image" / name).convert("RGB"), np.int16)
    off = np.abs(image - np.asarray(Image.open(second.image), np.int16)).mean()
    # noise is the worst that JPEG can get
    assert off <= (4 if name.endswith("jpg") else 0)


def test_semantic(runs: Path, good: Any, tmp_path: Path) -> None:
    out = exported(runs, "semantic", tmp_path / "out", good)
    assert (out / "data.yaml").read_text() == (
        "train: images/train\nval: images/val\nmasks_dir: masks\nnames:\n"
        '  0: "background"\n  1: "bottle/broken"\n  2: "bottle/scratch"\n  3: "screw/scratch"\n'
    )
    assert names_in(out / "images") == names_in(out / "masks")
    numbers = {("bottle", "broken"): 1, ("bottle", "scratch"): 2, ("screw", "scratch"): 3}
    for entry in folder_entries(runs):
        name = f"{entry.product}-{entry.defect}-{entry.number:06d}.png"
        (path,) = (out / "masks").glob(f"*/{name}")
        mask = np.asarray(Image.open(path))
        number = numbers[entry.product, entry.defect]
        assert np.array_equal(mask, np.where(flags(entry.mask), number, 0))
    assert not any(np.asarray(Image.open(p)).any() for p in (out / "masks").glob("*/*-good-*"))
    with pytest.raises(SettingsError, match="no pair is held out"):
        export(folder_entries(runs), "semantic", tmp_path / "other", good=good, held=0)


def test_only_accepted_pairs(runs: Path, tmp_path: Path) -> None:
    entries = list(folder_entries(runs / "bottle" / "broken", "bottle"))
    entries[1] = Entry(**{**vars(entries[1]), "verdict": "empty"})
    with pytest.warns(UserWarning, match="--good bottle=FOLDER"):
        done = export(entries, "mvtec", tmp_path / "out")
    assert (done.pairs, done.left_out) == (4, 1)
    # a number that is missing stays free: a pair keeps its name
    assert not (tmp_path / "out/bottle/test/broken/000001.png").exists()
    with pytest.raises(DataError, match="none of 1 pairs is accepted"):
        export([entries[1]], "mvtec", tmp_path / "other")


@pytest.mark.filterwarnings("ignore:product")
def test_names(runs: Path, tmp_path: Path) -> None:
    assert [slug(name) for name in ("Türgriff", "a b/..", "瓶", "x.y", "a--b", "good")] == [
        *("Turgriff", "a_b", slug("瓶"), "x_y", "a_b", "good"),
    ]
    assert slug("瓶").isascii()
    assert slug("瓶") != slug("螺")
    entries = list(folder_entries(runs / "bottle" / "broken", "Türgriff", "瓶"))
    out = tmp_path / "größe" / "out"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export(entries, "mvtec", out)
    told = " / ".join(str(warning.message) for warning in caught)
    assert "'Türgriff' is called Turgriff" in told
    assert "not plain ASCII" in told
    assert (out / "Turgriff").is_dir()
    twice = [*entries, *folder_entries(runs / "bottle" / "broken", "turgriff")]
    with pytest.raises(SettingsError, match="would both be called"):
        export(twice, "mvtec", tmp_path / "twice")
    with pytest.raises(SettingsError, match="cannot be called"):
        export(folder_entries(runs / "bottle" / "broken", "p", "Good"), "mvtec", tmp_path / "x")


@pytest.mark.filterwarnings("ignore:bottle/broken has 5 pairs")
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_left_of_a_failure(
    runs: Path, good: Any, tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in FORMATS[form].needs:
        pytest.importorskip(package)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OutputError, match=r"No space left on device.*: free some space"):
        export(folder_entries(runs), form, tmp_path / "out", good=good)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(runs: Path, good: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    exported(runs, "mvtec", out, good)
    before = names_in(out)
    with pytest.raises(OutputError, match="is there and not empty: remove it or choose another"):
        export(folder_entries(runs), "mvtec", out, good=good)
    assert names_in(out) == before


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder nobody can write")
def test_where_nothing_can_be_written(runs: Path, good: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(OutputError, match=r"cannot be written.*: choose another") as caught:
            export(folder_entries(runs), "mvtec", out, good=good)
        assert "\n" not in str(caught.value)


def test_what_a_killed_export_left_is_replaced(runs: Path, good: Any, tmp_path: Path) -> None:
    (tmp_path / "out.partial" / "junk").mkdir(parents=True)
    out = exported(runs, "mvtec", tmp_path / "out", good)
    assert not (out / "junk").exists()


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_damaged_pictures_are_named_first(runs: Path, tmp_path: Path, kind: str) -> None:
    run = write_run(tmp_path / "run", ["ring", "blob"])
    path = run / kind / "00001.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=str(path)):
        export(folder_entries(run, "p"), "mvtec", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    Image.new("RGB" if kind == "image" else "L", (8, 8)).save(path)
    with pytest.raises(DataError, match="has size"):
        export(folder_entries(run, "p"), "mvtec", tmp_path / "out")


def test_an_empty_mask_and_a_pair_twice_are_refused(runs: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["ring", "blob"])
    rows = list(folder_entries(run, "p"))
    with pytest.raises(DataError, match="has pair 0 twice"):
        export([*rows, rows[0]], "mvtec", tmp_path / "out")
    Image.new("L", (96, 104)).save(run / "mask" / "00000.png")
    with pytest.raises(DataError, match="is empty"):
        export(rows, "mvtec", tmp_path / "out")


def test_held_out() -> None:
    paths = [Path(f"{n}.png") for n in range(50)]
    some = held_out(paths, 0.2)
    assert len(some) == 10
    assert some == held_out(paths, 0.2)
    assert held_out(paths, 0) == set()
    assert len(held_out(paths[:2], 0.01)) == 1
    assert len(held_out(paths[:2], 0.99)) == 1
    assert held_out(paths[:1], 0.4) == set()


def test_the_command_line_names_every_format() -> None:
    assert ", ".join(FORMATS) == FORMS


def test_command_line(
    runs: Path, good: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = [f"--good={name}={paths[0].parent}" for name, paths in good.items()]
    command = ["export-dataset", str(runs), "--format", "mvtec", *normal]
    out = ["--out", str(tmp_path / "out")]
    assert main([*command, *out]) == 0
    assert "10 pairs, 10 normal pictures" in capsys.readouterr().out
    faults = {
        "is there and not empty": [*command, *out],
        "there is no format 'pascal'": [*command, *out, "--format", "pascal"],
        "PRODUCT=FOLDER": [*command, *out, "--good", "x"],
        "given twice": [*command, *out, normal[0]],
        "is not a folder": [*command, *out, "--good", "x=/nowhere"],
        "less than 1": [*command, *out, "--held-out", "1"],
        "no pairs: the products are": [
            "export-dataset",
            str(runs),
            "--format",
            "mvtec",
            "--out",
            str(tmp_path / "new"),
            f"--good=flask={good['screw'][0].parent}",
        ],
    }
    for said, arguments in faults.items():
        assert main(arguments) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1, told
