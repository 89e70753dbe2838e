"""The command line: what it writes, and that every mistake ends in one line that helps."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dualdiff_engine
from dualdiff_engine import ops
from dualdiff_engine.cli import main
from dualdiff_engine.engine import Engine
from dualdiff_engine.folder_writer import KINDS, MANIFEST, QUARANTINE, FolderWriter
from dualdiff_engine.pipeline import generate as generation
from support import DATA

DUAL, BCM = DATA / "dual", DATA / "bcm"
FAST = ("--allow-pickle", "--steps", "2", "--size", "64")


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def generate(case: Path, out: Path, *options: object) -> int:
    return run(
        "generate", "--base", case / "model", "--adapter", case / "adapter", "--out", out, *options
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / MANIFEST).read_text("utf-8").splitlines()]


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("*/*")}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # two threads that wait for each other on a busy machine turn milliseconds into seconds
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pairs of the case without background."""
    out = tmp_path_factory.mktemp("drawn") / "out"
    assert generate(DUAL, out, *FAST, "--size", "64x96", "--count", 2, "--seed", 7) == 0
    return out


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("converted") / "bcm.safetensors"
    assert run("convert", BCM / "adapter", path) == 0
    return path


def test_generate_writes_pictures_masks_and_rows(drawn: Path) -> None:
    assert set(files(drawn)) == {f"{kind}/0000{n}.png" for kind in KINDS for n in (0, 1)}
    for row, seed in zip(rows(drawn), (7, 8), strict=True):
        assert row["seed"] == row["recipe"]["seed"] == seed
        assert row["recipe"]["sampling"]["steps"] == 2
        for kind, mode in KINDS.items():
            with Image.open(drawn / row["files"][kind]) as picture:
                assert (picture.size, picture.mode) == ((96, 64), mode)
                levels = set(np.unique(picture).tolist())
            if kind == "mask":
                assert levels <= {0, 255}
                assert row["empty_mask"] is (255 not in levels)
            else:
                assert len(levels) > 16


def test_a_recipe_makes_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    recipes = [row["recipe"] for row in rows(drawn)]
    sampling = recipes[0]["sampling"]
    size = f"{sampling['height']}x{sampling['width']}"
    options = ("--steps", sampling["steps"], "--guidance", sampling["guidance"], "--size", size)
    seeds = ("--seeds", ",".join(str(recipe["seed"]) for recipe in recipes))
    scheduler = ("--scheduler", sampling["scheduler"])
    assert generate(DUAL, tmp_path, "--allow-pickle", *seeds, *options, *scheduler) == 0
    assert files(tmp_path) == files(drawn)


def test_generate_continues_and_reports(
    drawn: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(drawn, tmp_path / "out")
    more = ("--seeds", "20:22,3", "--batch", 2)
    assert generate(DUAL, out, *FAST, *more) == 2
    assert "holds pairs of another recipe (other sampling)" in capfd.readouterr().err
    assert generate(DUAL, out, *FAST, *more, "--append") == 0
    said = capfd.readouterr()
    assert [row["seed"] for row in rows(out)] == [7, 8, 20, 21, 3]
    assert [row["index"] for row in rows(out)] == [0, 1, 2, 3, 4]
    assert files(drawn).items() < files(out).items()
    empty = sum(row["empty_mask"] for row in rows(out)[2:])
    assert said.out == f"new pairs in {out}: 3 (empty masks: {empty}, full masks: 3)\n"
    # PNDM takes one call more than steps; three pairs
    assert "9/9" in said.err
    assert "arning" not in said.err


def test_the_same_command_twice_draws_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for given in (("--seed", 3, "-n", 2), ("-n", 2), ("-n", 1)):
        assert generate(DUAL, tmp_path, *FAST, *given) == 0
        assert [row["seed"] for row in rows(tmp_path)] == [3, 4]
    assert "1 of 1 pairs were already there" in capfd.readouterr().out
    assert generate(DUAL, tmp_path, *FAST, "--seed", 3, "-n", 3) == 0
    assert [row["seed"] for row in rows(tmp_path)] == [3, 4, 5]
    assert "2 of 3 pairs were already there" in capfd.readouterr().out
    assert generate(DUAL, tmp_path, *FAST, "-n", 4) == 0
    assert len({row["seed"] for row in rows(tmp_path)}) == 4


@pytest.mark.parametrize("harm", ["gone", "cut off", "a bit flipped"])
def test_a_lost_picture_is_drawn_again(tmp_path: Path, harm: str) -> None:
    assert generate(DUAL, tmp_path, *FAST, "--seeds", "1,2") == 0
    before, path = files(tmp_path), tmp_path / "anomaly" / "00001.png"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.unlink()
    if harm != "gone":
        path.write_bytes(content[:-20] if harm == "cut off" else content)
    assert generate(DUAL, tmp_path, *FAST, "--seeds", "1,2") == 0
    assert files(tmp_path) == before
    assert len(rows(tmp_path)) == 2


def test_a_seed_twice_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(DUAL, tmp_path, *FAST, "--seeds", "5,5") == 2
    assert "seed 5 is given twice" in capfd.readouterr().err


def test_unusable_pairs_are_set_aside(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generation.denoise

    def denoise(*arguments: Any) -> Any:
        generators, step_end = arguments[6], arguments[8]
        bad = [generator.initial_seed() == 2 for generator in generators]

        def spoiled(step: int, timestep: Any, latents: Any) -> Any:
            latents = latents.clone()
            latents[torch.tensor(bad)] = float("nan")
            return step_end(step, timestep, latents)

        return real(*arguments[:8], spoiled)

    monkeypatch.setattr(generation, "denoise", denoise)
    assert generate(DUAL, tmp_path, *FAST, "--seeds", "1:4", "--batch", 3) == 3
    assert [row["seed"] for row in rows(tmp_path)] == [1, 3]
    (aside,) = [json.loads(x) for x in (tmp_path / QUARANTINE).read_text().splitlines()]
    assert aside["seed"] == 2
    assert "not finite from step 0 on" in aside["reason"]
    assert "set aside as unusable: 1" in capfd.readouterr().out
    # it would come out so again
    assert generate(DUAL, tmp_path, *FAST, "--seeds", "1:4") == 3
    assert len(rows(tmp_path)) == 2


def test_sigterm_keeps_finished_pairs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderWriter.write

    def write(writer: FolderWriter, pair: Any) -> int:
        signal.raise_signal(signal.SIGTERM)
        return real(writer, pair)

    monkeypatch.setattr(FolderWriter, "write", write)
    assert generate(DUAL, tmp_path, *FAST, "-n", 3, "--batch", 1) == 143
    assert len(rows(tmp_path)) == 1
    assert capfd.readouterr().err.endswith("dualdiff: terminated\n")


def test_a_closed_stdout_and_a_full_stderr_cost_no_pair(tmp_path: Path) -> None:
    words = [*("generate", "--base", DUAL / "model", "--adapter", DUAL / "adapter", *FAST)]
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n"
        "from dualdiff_engine.cli import main; code = main(sys.argv[1:])\n"
        "os._exit(code)"
    )
    words = [str(word) for word in (*words, "-n", 2, "--out", tmp_path)]
    run = subprocess.run([sys.executable, "-c", code, *words], check=False, timeout=120)
    assert run.returncode == 0
    assert len(rows(tmp_path)) == 2


def test_a_removed_manifest_is_noticed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderWriter.write

    def write(writer: FolderWriter, pair: Any) -> int:
        (tmp_path / MANIFEST).unlink(missing_ok=True)
        return real(writer, pair)

    monkeypatch.setattr(FolderWriter, "write", write)
    assert generate(DUAL, tmp_path, *FAST, "-n", 1) == 2
    assert "was removed or replaced while this run was writing" in capfd.readouterr().err


def test_quiet_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(DUAL, tmp_path, *FAST, "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    assert len(rows(tmp_path)) == 1


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A background picture and the mask of its object."""
    folder = tmp_path_factory.mktemp("surroundings")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    mask = np.zeros((80, 100), np.uint8)
    mask[20:50, 30:70] = 255
    paths = (folder / "picture.png", folder / "mask.png")
    for array, path in zip((pixels, mask), paths, strict=True):
        Image.fromarray(array).save(path)
    return paths


def test_generate_with_background(
    converted: Path, surroundings: tuple[Path, Path], tmp_path: Path
) -> None:
    picture, mask = surroundings
    common = ("--base", BCM / "model", "--adapter", converted, *FAST[1:], "--seed", 1)
    given = ("--background", picture, "--background-noise", "fixed", "--background-noise-seed", 5)
    assert run("generate", *common, *given, "--out", tmp_path / "whole") == 0
    assert run("generate", *common, *given, "--object-mask", mask, "--out", tmp_path / "cut") == 0
    (whole,), (cut,) = rows(tmp_path / "whole"), rows(tmp_path / "cut")
    for row in (whole, cut):
        assert row["recipe"]["background"]["noise"] == "fixed"
        assert row["recipe"]["background"]["noise_seed"] == 5
        assert row["recipe"]["sampling"]["guidance"] == 2.0
    shas = [row["recipe"]["background"]["picture_sha256"] for row in (whole, cut)]
    assert shas[0] != shas[1]
    assert files(tmp_path / "whole") != files(tmp_path / "cut")


@pytest.fixture(scope="module")
def normal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three normal pictures, their regions and objects by name, and masks of defects."""
    root = tmp_path_factory.mktemp("normal")
    for name in ("good", "regions", "objects", "masks"):
        (root / name).mkdir()
    for n in range(3):
        pixels = np.random.default_rng(n).integers(1, 256, (64, 64, 3), np.uint8)
        region, whole = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
        region[16:40, 8 + 8 * n : 32 + 8 * n] = 255
        whole[8:56, 8:56] = 255
        Image.fromarray(pixels).save(root / f"good/{n:03d}.png")
        Image.fromarray(region).save(root / f"regions/{n:03d}.png")
        Image.fromarray(region).save(root / f"masks/{n:03d}.png")
        Image.fromarray(whole).save(root / f"objects/{n:03d}_mask.png")
    return root


def test_generate_on_normal_pictures(normal: Path, tmp_path: Path) -> None:
    """A pair per picture; the same command again draws nothing; more pairs start again."""
    given = ("--picture", normal / "good", "--region", normal / "regions", "--edge", 0)
    assert generate(DUAL, tmp_path, *FAST, *given, "--seed", 5) == 0
    before = files(tmp_path)
    assert len(before) == 9
    for n in range(3):
        drawn, whole, region = (
            np.asarray(Image.open(path))
            for path in (
                tmp_path / f"image/{n:05d}.png",
                normal / f"good/{n:03d}.png",
                normal / f"regions/{n:03d}.png",
            )
        )
        assert np.array_equal(drawn[region == 0], whole[region == 0])
        assert not np.array_equal(drawn, whole)
    assert generate(DUAL, tmp_path, *FAST, *given, "--seed", 5, "--count", 4) == 0
    assert {name: files(tmp_path)[name] for name in before} == before
    placements = [row["recipe"]["placement"] for row in rows(tmp_path)]
    assert placements[3] == placements[0] != placements[1]


def test_generate_in_windows_of_large_pictures(normal: Path, tmp_path: Path) -> None:
    """Pictures of different sizes, each pair in its picture's own; a second run draws nothing."""
    for name in ("good", "regions"):
        (tmp_path / name).mkdir()
        for n in range(2):
            small = Image.open(normal / f"{name}/{n:03d}.png")
            large = Image.new(small.mode, (200 + 50 * n, 150), 0 if name == "regions" else "grey")
            large.paste(small, (90, 40))
            large.save(tmp_path / f"{name}/{n:03d}.png")
    given = ("--picture", tmp_path / "good", "--region", tmp_path / "regions", "--window", "auto")
    out = tmp_path / "out"
    for _ in range(2):
        assert generate(DUAL, out, *FAST, *given, "--edge", 0, "--seed", 5) == 0
    windows = [row["recipe"]["window"] for row in rows(out)]
    # around the middle of the regions, (110 + 8 n, 68)
    assert windows == [
        {"box": [78, 36, 64, 64], "picture": [200, 150]},
        {"box": [86, 36, 64, 64], "picture": [250, 150]},
    ]
    for n in range(2):
        drawn, whole, region = (
            np.asarray(Image.open(path))
            for path in (
                out / f"image/{n:05d}.png",
                tmp_path / f"good/{n:03d}.png",
                tmp_path / f"regions/{n:03d}.png",
            )
        )
        assert np.array_equal(drawn[region == 0], whole[region == 0])
        assert not np.array_equal(drawn, whole)


def test_regions_are_sampled_like_masks(normal: Path, converted: Path, tmp_path: Path) -> None:
    """With background: the pictures are their own, without their objects."""
    common = ("--base", BCM / "model", "--adapter", converted, *FAST[1:], "--seed", 1)
    given = ("--picture", normal / "good/00[01].png", "--object-mask", normal / "objects")
    masks = ("--region-masks", normal / "masks", "--paste", "none")
    assert run("generate", *common, *given, *masks, "--out", tmp_path) == 0
    recipes = [row["recipe"] for row in rows(tmp_path)]
    assert len({recipe["background"]["picture_sha256"] for recipe in recipes}) == 2
    for recipe in recipes:
        assert recipe["placement"]["statistics"]["counts"] == [1, 1, 1]
        assert recipe["placement"]["paste"] == "none"


def test_pairs_are_drawn_again(
    normal: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("--picture", normal / "good/000.png", "--region", normal / "regions/000.png")
    bounds = ("--mask", "both", "--accept", "min_area=1", "--attempts", 2, "--seed", 5)
    assert generate(DUAL, tmp_path, *FAST, *given, *bounds) == 0
    (row,) = rows(tmp_path)
    assert row["accepted"] is False
    assert row["recipe"]["accept"] == {"min_area": 1.0, "attempts": 2}
    assert row["recipe"]["mask_source"] == "both"
    assert "not accepted in any attempt: 1" in capfd.readouterr().out


def test_demo_regions_are_those_of_its_training() -> None:
    from dualdiff_engine.cli.demo import statistics

    found = statistics("washer/chip")
    assert len(found.counts) == 8
    assert all(0.01 < area < 0.2 for area, _ in found.parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--region {n}/regions", "--region needs --picture"),
        ("--edge 1", "--edge needs --picture"),
        ("--paste none", "--paste needs --picture"),
        ("--window auto", "--window needs --picture"),
        (
            "--picture {n}/good --region {n}/regions --window all",
            "--window must be auto or a number such as 2.5, got 'all'",
        ),
        (
            "--picture {n}/good --region {n}/regions --window 0.5",
            "placement window must be 'auto' or 1 and more (its side over the region's), got 0.5",
        ),
        ("--picture {n}/nothing", "--picture: no pictures at"),
        ("--picture {n}/good", "where does the defect go? Pass --region, or --region-masks"),
        ("--picture {n}/good --region {n}/good/none.png", "does not exist"),
        ("--picture {n}/good --region {n}/objects --edge 99", "edge must be from 0 to 16"),
        ("--picture {n}/good --region {n}", "--region: {n} has no mask of 000.png: add 000_mask"),
        ("--picture {n}/good --region-masks {n}", "--region-masks: {n} holds no pictures"),
        ("--accept good", "--accept: 'good' is not a bound: write 'default' or min_area"),
        (
            "--picture {n}/good --region {n}/regions --object-mask none",
            "--object-mask: no file or folder 'none'",
        ),
    ],
)
def test_generate_says_what_is_wrong_with_a_placement(
    normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    out = tmp_path / "out"
    arguments = ("generate", "--base", "base", "--adapter", "adapter", "--out", out)
    assert message.format(n=normal) in complaint(
        capsys, *arguments, *options.format(n=normal).split()
    )
    assert not out.exists()


def test_convert_then_inspect(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", BCM / "adapter", converted, "--force") == 0
    said = capsys.readouterr().out
    assert str(converted) in said
    assert run("inspect", converted, "--base", BCM / "model", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert f"sha256 {summary['sha256']}" in said
    assert f"{summary['parameters']:,} parameters" in said
    assert summary["rank"] == json.loads((BCM / "case.json").read_text())["rank"]
    assert summary["branches"] == ["image", "anomaly"]
    assert summary["text_encoder_layers"] == 2
    assert summary["fits"] == str(BCM / "model")
    # every second site is self-attention
    assert 2 * len(summary["blend"]) == summary["sites"]


def test_inspect_shows_a_table(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", converted) == 0
    table = capsys.readouterr().out
    assert re.search(
        r"^mid_block\.attentions\.0\.transformer_blocks\.0\.attn1 +0\.\d+$", table, re.M
    )
    assert "not checked: pass --base" in table
    assert run("inspect", DUAL / "adapter", "--allow-pickle", "--base", DUAL / "model") == 0
    table = capsys.readouterr().out
    assert "mid_block" not in table
    for words in (["background", "none"], ["fits", str(DUAL / "model")], ["rank", "4"]):
        assert words in [line.split() for line in table.splitlines()]


def test_doctor_tells_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--device", "cpu", "--dtype", "bfloat16", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["dualdiff-engine"] == dualdiff_engine.__version__
    assert {"triton", "xformers", "onnx", "onnxruntime", "tensorrt"} <= set(report["optional"])
    assert report["devices"]["cpu"]["cores"] == os.cpu_count()
    assert any(name.startswith("cuda") for name in report["devices"])
    assert (report["device"], report["dtype"]) == ("cpu", "bfloat16")
    assert {row["op"] for row in report["ops"]} == set(ops.NAMES)
    assert all(row["backend"] and row["reason"] for row in report["ops"])
    assert run("doctor", "--device", "cpu") == 0
    table = capsys.readouterr().out
    for name, version in report["optional"].items():
        words = next(line for line in table.splitlines() if line.split()[:1] == [name])
        assert (version or "not installed: pip install 'dualdiff-engine[") in words


def test_doctor_lists_gpus(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: gpu)
    assert run("doctor", "--device", "cpu") == 0
    table = capsys.readouterr().out
    assert re.search(r"^cuda:0 +name NVIDIA H200, GiB 140, capability 9.0$", table, re.M)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"dualdiff {dualdiff_engine.__version__}\n"


def test_nothing_slow_is_imported_early() -> None:
    program = """
import sys
from dualdiff_engine.cli import main
assert main(["--help"]) == 0
assert not {"torch", "numpy", "cv2", "PIL", "diffusers"} & set(sys.modules), "by --help"
assert main(["doctor"]) == 0
optional = {"diffusers", "transformers", "xformers", "onnx", "onnxruntime", "tensorrt"}
assert not optional & set(sys.modules), "by doctor"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def complaint(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr that the arguments are refused with."""
    assert run(*arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dualdiff: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "Missing command: see dualdiff --help"),
        ("paint", "No such command 'paint'"),
        ("--loud", "No such option: --loud"),
        ("generate", "Missing option '--out': see dualdiff generate --help"),
        ("convert x.bin", "Missing argument"),
        ("inspect nothing.safetensors", "no adapter at 'nothing.safetensors'"),
        ("convert nothing.bin out.safetensors", "no adapter at 'nothing.bin'"),
        ("doctor --dtype int8", "'int8' is not one of 'auto', 'float32'"),
        ("doctor --device tpu", "device"),
        ("doctor --device cpu --dtype float16", "use bfloat16"),
    ],
)
def test_commands_say_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert message in complaint(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--count 0", "'--count'"),
        ("--count 9999999", "1000000"),
        ("--batch 0", "'--batch'"),
        ("--seeds 1,x", "'x' is not a seed or an ascending range"),
        ("--seeds 5:5", "'5:5' is not a seed"),
        ("--seeds 0:99999999", "at most 1,000,000 pairs"),
        ("--seeds 9223372036854775808", "2^63-1"),
        ("--seeds 1 --count 1", "leave out --count and --seed"),
        ("--seeds 1 --seed 1", "leave out --count and --seed"),
        ("--seed -1", "from 0 to 2^63-1"),
        ("--seed 9223372036854775807 -n 2", "from 0 to 2^63-1"),
        ("--steps 0", "steps must be a whole number from 1 to 1000"),
        ("--steps many", "'--steps'"),
        ("--preset quick", "no preset 'quick': choose one of released, fast, draft"),
        ("--spacing even", "spacing must be one of linspace, leading, trailing"),
        ("--order 9", "order must be a whole number from 1 to 3"),
        ("--timesteps 5,x", "--timesteps must be numbers such as 999,750,500"),
        ("--timesteps 5,9", "descending"),
        ("--guidance nan", "guidance must be a finite number"),
        ("--size 100", "height must be a multiple of 8"),
        ("--size 64x", "--size must be 512 or 512x768"),
        ("--background {picture} --object-mask nothing.png", "no file 'nothing.png'"),
        ("--object-mask {picture}", "need --background PICTURE, or a mask of --picture"),
        ("--background-noise fixed", "need --background PICTURE"),
        ("--background-noise often", "'often' is not one of 'fresh', 'fixed'"),
        ("--background nothing.png", "'nothing.png' does not exist"),
        ("--background {text}", "is not a readable picture"),
        ("--background {picture} --object-mask {small}", "they must match"),
        ("--background {picture} --background-noise-seed -1", "noise_seed must be from 0"),
        ("--segmenter nothing.onnx", "'nothing.onnx' does not exist"),
        ("--dtype int8", "'int8' is not one of"),
    ],
)
def test_generate_says_what_is_wrong_before_it_touches_the_disk(
    tmp_path: Path,
    surroundings: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    small = tmp_path / "small.png"
    Image.new("L", (8, 8)).save(small)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    out = tmp_path / "out"
    values = options.format(picture=surroundings[0], small=small, text=text).split()
    arguments = ("generate", "--base", "base", "--adapter", "adapter", "--out", out, *values)
    assert message in complaint(capsys, *arguments)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device tpu", "device"),
        ("--backend nope", "no backend is called 'nope'"),
        ("--base /nowhere", "no base model at '/nowhere'"),
        ("--adapter /nowhere.safetensors", "no adapter at '/nowhere.safetensors'"),
        ("--adapter {text}", "neither .safetensors nor .bin"),
        ("--scheduler Nope", "no scheduler 'Nope'"),
        ("--order 2", "PNDMScheduler does not take order"),
        ("--background {picture}", "trained without background"),
        ("--segmenter {text}", "text.png"),
    ],
)
def test_generate_says_what_the_engine_refuses(
    tmp_path: Path,
    surroundings: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no model")
    values = options.format(picture=surroundings[0], text=text).split()
    common = ("generate", "--base", DUAL / "model", "--adapter", DUAL / "adapter", "--out")
    assert message in complaint(capsys, *common, tmp_path / "out", "--allow-pickle", *values)
    assert rows(tmp_path / "out") == []


def test_remedies_speak_of_options(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run("inspect", DUAL / "adapter") == 2
    said = capsys.readouterr().err
    assert "\n    dualdiff convert " in said
    assert "--allow-pickle" in said
    common = ("generate", "--base", BCM / "model", "--adapter", converted, "--out", tmp_path)
    assert "pass --background PICTURE" in complaint(capsys, *common)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 16 bytes from file <x>: Cannot allocate memory (12)")

    monkeypatch.setattr(Engine, "from_pretrained", fail)
    assert "out of memory: close other programs" in complaint(capsys, *common)


def test_folders_that_cannot_be_written(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below = tmp_path / "file" / "out"
    below.parent.touch()
    common = ("generate", "--base", "base", "--adapter", "adapter", "--out")
    assert f"{below} cannot be written" in complaint(capsys, *common, below)
    target = below / "adapter.safetensors"
    assert str(below) in complaint(capsys, "convert", converted, target)
    endless = tmp_path / f"{'a' * 300}.safetensors"
    assert "File name too long" in complaint(capsys, "convert", converted, endless)
    with FolderWriter(tmp_path / "busy"):
        assert "another run" in complaint(capsys, *common, tmp_path / "busy")


def test_convert_refuses_targets(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = converted.read_bytes()
    assert "pass --force" in complaint(capsys, "convert", DUAL / "adapter", converted)
    assert converted.read_bytes() == before
    wrong = tmp_path / "adapter.bin"
    assert "must end in .safetensors" in complaint(capsys, "convert", converted, wrong)


def test_inspect_refuses_another_base(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(BCM / "model", tmp_path / "base")
    path = base / "text_encoder" / "config.json"
    path.chmod(0o600)
    path.write_text(json.dumps({"hidden_size": 64, "num_hidden_layers": 2}))
    said = complaint(capsys, "inspect", converted, "--base", base)
    assert "text_encoder.text_model.encoder.layers.0.self_attn" in said
    assert "another base" in said
    path.write_text("{}")
    assert str(path) in complaint(capsys, "inspect", converted, "--base", base)


def test_a_full_disk_keeps_finished_pairs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(99))

    def fsync(file: int) -> None:
        # seven per pair: the second pair's anomaly picture
        if next(calls) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    assert generate(DUAL, tmp_path, *FAST, "-n", 2) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith(f"dualdiff: {tmp_path / 'anomaly' / '00001.png.partial'} cannot")
    assert set(files(tmp_path)) == {f"{kind}/00000.png" for kind in KINDS}
    assert len(rows(tmp_path)) == 1


def test_interrupt_keeps_finished_pairs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FolderWriter.write

    def write(writer: FolderWriter, pair: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        return real(writer, pair)

    monkeypatch.setattr(FolderWriter, "write", write)
    handler = signal.getsignal(signal.SIGINT)
    assert generate(DUAL, tmp_path, *FAST, "-n", 3, "--batch", 1) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    said = capfd.readouterr()
    assert said.out.startswith(f"new pairs in {tmp_path}: 1 ")
    assert "stopping after this step" in said.err
    assert said.err.endswith("dualdiff: interrupted\n")
    assert len(rows(tmp_path)) == 1


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_interrupt_stops_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, before: Any
) -> None:
    def write(writer: FolderWriter, pair: Any) -> int:
        signal.raise_signal(signal.SIGINT)
        # the main thread takes signals, and two at once are one
        while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        return -1

    monkeypatch.setattr(FolderWriter, "write", write)
    handler = signal.signal(signal.SIGINT, before)
    try:
        assert generate(DUAL, tmp_path, *FAST, "-n", 2, "--batch", 1) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capfd.readouterr().err.endswith("dualdiff: interrupted\n")
    assert rows(tmp_path) == []


def test_the_second_system_by_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Train, inspect, draw: an adapter of another coupling is used as any other."""
    from training_cases import DEFECT, SIZE, base_of, write_data

    data, base = write_data(tmp_path / "data"), base_of(False)
    least = ("--rank", 4, "--size", SIZE, "--batch", 2, "--sample-every", 0, "--steps", 2)
    wanted = ("--system", "dh-diff", "--annotation", "mask")
    given = ("--base", base, "--data", data, "--defect", DEFECT, "--out", tmp_path / "run")
    assert run("train", *given, *least, *wanted, "--quiet") == 0
    assert run("inspect", tmp_path / "run") == 0
    assert "separate/merge/plain/merge in 10 blocks, draws the mask" in capfd.readouterr().out
    out = tmp_path / "pairs"
    drawn = ("--base", base, "--adapter", tmp_path / "run", "--out", out, "--steps", 2)
    assert run("generate", *drawn, "--quiet") == 0
    assert len(rows(out)) == 1
    said = complaint(capfd, "train", *given, *least, "--cycle", "a/b")
    assert "cycle: block 'a/b' is not attention/exchange/text/exchange" in said
