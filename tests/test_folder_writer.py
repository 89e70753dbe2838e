"""The output folder: what is in it, and that neither a crash nor a full disk makes it lie."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.folder_writer import KINDS, MANIFEST, QUARANTINE, FolderWriter
from dualdiff_engine.pair import Pair

WRITE_FOREVER = """
import sys
from types import SimpleNamespace
from PIL import Image
from dualdiff_engine.folder_writer import FolderWriter
pair = SimpleNamespace(
    image=Image.effect_noise((64, 64), 50).convert("RGB"),
    anomaly=Image.effect_noise((64, 64), 50).convert("RGB"),
    mask=Image.new("L", (64, 64), 255),
    seed=1, empty_mask=False, scores={}, accepted=None, recipe={"filler": "x" * 5000},
)
with FolderWriter(sys.argv[1]) as writer:
    while True:
        writer.write(pair)
        print("written", flush=True)
"""


def pair(seed: int = 0) -> Pair:
    noise = np.random.default_rng(seed)
    image, anomaly = (noise.integers(0, 256, (24, 40, 3), np.uint8) for _ in range(2))
    mask = np.where(noise.random((24, 40)) > 0.5, 255, 0).astype(np.uint8)
    pictures = [Image.fromarray(array) for array in (image, anomaly, mask)]
    return Pair(*pictures, seed=seed, empty_mask=False, recipe={"seed": seed, "prompt": "ü"})


def written(root: Path, *seeds: int) -> Path:
    with FolderWriter(root) as writer:
        for seed in seeds:
            writer.write(pair(seed))
    return root


def rows(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / MANIFEST).read_text("utf-8").splitlines()]


def listing(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def expected(*indexes: int) -> set[str]:
    return {f"{kind}/{index:05d}.png" for kind in KINDS for index in indexes} | {MANIFEST}


def test_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    root = written(tmp_path / "a" / "b", 3, 4)
    assert listing(root) == expected(0, 1)
    for row, seed in zip(rows(root), (3, 4), strict=True):
        assert row["seed"] == seed
        assert row["empty_mask"] is False
        assert row["recipe"] == {"seed": seed, "prompt": "ü"}
        assert row["files"] == {kind: f"{kind}/{row['index']:05d}.png" for kind in KINDS}
        for kind, mode in KINDS.items():
            with Image.open(root / row["files"][kind]) as picture:
                assert picture.mode == mode
                np.testing.assert_array_equal(picture, getattr(pair(seed), kind))


def test_a_run_is_continued(tmp_path: Path) -> None:
    written(tmp_path, 1)
    before = (tmp_path / "image/00000.png").read_bytes()
    with FolderWriter(tmp_path) as writer:
        assert writer.write(pair(2)) == 1
    assert (tmp_path / "image/00000.png").read_bytes() == before
    assert [row["index"] for row in rows(tmp_path)] == [0, 1]


def test_numbers_outgrow_five_digits(tmp_path: Path) -> None:
    tmp_path.joinpath(MANIFEST).write_text('{"index": 99999}\n')
    written(tmp_path, 1, 2)
    assert rows(tmp_path)[-1]["files"]["mask"] == "mask/100001.png"


@pytest.mark.parametrize("kind", KINDS)
def test_other_presentations_are_refused(tmp_path: Path, kind: str) -> None:
    arrays = {**vars(pair()), kind: np.zeros((8, 8, 3), np.float32)}
    with FolderWriter(tmp_path) as writer, pytest.raises(SettingsError, match="pil"):
        writer.write(Pair(**arrays))
    assert listing(tmp_path) == {MANIFEST}


def refusal(root: Path) -> str:
    """The one line that entering the folder is refused with."""
    with pytest.raises(OutputError) as caught, FolderWriter(root):
        pass
    message = str(caught.value)
    assert "\n" not in message
    assert "choose another folder" in message
    return message


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    tmp_path.joinpath("file").touch()
    assert str(tmp_path / "file") in refusal(tmp_path / "file")
    assert str(tmp_path / "file" / "out") in refusal(tmp_path / "file" / "out")


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the superuser may write everywhere, so that permissions alone prove nothing
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "anomaly")
    assert "anomaly/: Permission denied" in refusal(tmp_path)


@pytest.mark.parametrize("name", [*KINDS, MANIFEST])
@pytest.mark.parametrize("dangling", [False, True])
def test_symlinks_out_of_the_folder_are_refused(tmp_path: Path, name: str, dangling: bool) -> None:
    root, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    root.mkdir()
    if not dangling:
        elsewhere.touch() if name == MANIFEST else elsewhere.mkdir()
    (root / name).symlink_to(elsewhere)
    assert f"{root / name} is a symbolic link" in refusal(root)
    assert elsewhere.exists() is not dangling


def test_the_folder_itself_may_be_a_symlink(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    written(tmp_path / "out", 1)
    assert listing(tmp_path / "disk") == expected(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", [MANIFEST, QUARANTINE])
def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert f"{tmp_path / name} is not a regular file" in refusal(tmp_path)


def test_pictures_of_others_are_not_overwritten(tmp_path: Path) -> None:
    picture = tmp_path / "mask" / "00000.png"
    picture.parent.mkdir()
    picture.write_bytes(b"precious")
    for _ in range(2):
        assert str(picture) in refusal(tmp_path)
    picture.rename(picture.with_name("00002.png"))
    tmp_path.joinpath(MANIFEST).write_text('{"index": 0}\n')
    assert "00002.png" in refusal(tmp_path)


def test_two_runs_do_not_mix(tmp_path: Path) -> None:
    with FolderWriter(tmp_path) as writer:
        assert "another run" in refusal(tmp_path)
        writer.write(pair())
    written(tmp_path, 1)
    assert [row["index"] for row in rows(tmp_path)] == [0, 1]


def test_a_killed_run_leaves_whole_pairs_and_no_lock(tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", WRITE_FOREVER, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert run.stdout is not None
    for _ in range(20):
        assert run.stdout.readline() == "written\n"
    assert "another run" in refusal(tmp_path)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    with FolderWriter(tmp_path) as writer:
        index = writer.write(pair(5))
    assert index >= 20
    assert listing(tmp_path) == expected(*range(index + 1))
    assert [row["index"] for row in rows(tmp_path)] == list(range(index + 1))
    for path in tmp_path.glob("*/*.png"):
        with Image.open(path) as picture:
            picture.load()


@pytest.mark.parametrize("kept", [0, 1, 30, -2])
def test_a_row_that_was_cut_off_is_dropped(tmp_path: Path, kept: int) -> None:
    manifest = written(tmp_path, 1, 2) / MANIFEST
    first, last = manifest.read_bytes().splitlines()
    manifest.write_bytes(first + b"\n" + last[:kept])
    with FolderWriter(tmp_path) as writer:
        assert writer.write(pair(3)) == 1
    assert [row["seed"] for row in rows(tmp_path)] == [1, 3]
    assert listing(tmp_path) == expected(0, 1)


def test_a_row_that_lost_only_its_end_of_line_is_kept(tmp_path: Path) -> None:
    manifest = written(tmp_path, 1, 2) / MANIFEST
    manifest.write_bytes(manifest.read_bytes().removesuffix(b"\n"))
    written(tmp_path, 3)
    assert [row["seed"] for row in rows(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"{", b"[]", b"{}", b'{"index": -1}', b'{"index": true}', b"\xff", b"[" * 99_999),
        *(b'{"index": 1, "files": 7}', b'{"index": 1, "seed": 2, "recipe": {"seed": 3}}'),
    ],
    ids=lambda line: line.decode("latin-1")[:16],
)
def test_a_damaged_row_is_named(tmp_path: Path, line: bytes) -> None:
    manifest = written(tmp_path, 1, 2) / MANIFEST
    first, last = manifest.read_bytes().splitlines()
    damaged = b"\n".join([first, line, last, b""])
    manifest.write_bytes(damaged)
    assert f"{manifest}: line 2 is damaged" in refusal(tmp_path)
    assert manifest.read_bytes() == damaged


@pytest.mark.parametrize("part", ["base", "adapter", "background"])
def test_a_recipe_that_was_edited_is_another_one(tmp_path: Path, part: str) -> None:
    recipe = {"base": {"sha256": "1"}, "adapter": {"sha256": "2"}, "background": None}
    row = {"index": 0, "seed": 1, "recipe": {**recipe, part: True}}
    (tmp_path / MANIFEST).write_text(json.dumps(row) + "\n")
    match = rf"another recipe \(other {part}\)"
    with FolderWriter(tmp_path) as writer, pytest.raises(OutputError, match=match):
        writer.missing([recipe], [1], free=False)


def test_a_row_that_is_there_twice_is_named(tmp_path: Path) -> None:
    manifest = written(tmp_path, 1, 2) / MANIFEST
    manifest.write_bytes(manifest.read_bytes() + manifest.read_bytes().splitlines()[0] + b"\n")
    assert f"{manifest}: line 3 lists pair 0 again" in refusal(tmp_path)


def test_files_of_an_unfinished_pair_are_replaced(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    root = written(tmp_path / "out", 1)
    (root / "image/00001.png").write_bytes(b"whole but not listed")
    (root / "anomaly/00001.png.partial").write_bytes(b"half")
    (root / "mask/00001.png.partial").symlink_to(outside)
    written(root, 2)
    assert listing(root) == expected(0, 1)
    assert outside.read_bytes() == b"precious"
    with Image.open(root / "image/00001.png") as picture:
        np.testing.assert_array_equal(picture, pair(2).image)


def failing_after(calls: int, real: Callable[[int], None], error: BaseException) -> Any:
    """os.fsync that fails once, at a later call: every file of a pair goes through it."""
    left = [calls]

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] == -1:
            raise error
        real(file)

    return fsync


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("calls", range(7))
def test_nothing_of_a_failed_pair_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, error: BaseException
) -> None:
    # three files, the names in three folders, then the row
    files = ("image/00001.png", "anomaly/00001.png", "mask/00001.png", *([""] * 3), MANIFEST)
    with FolderWriter(tmp_path) as writer:
        writer.write(pair(1))
        monkeypatch.setattr(os, "fsync", failing_after(calls, os.fsync, error))
        with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
            writer.write(pair(2))
        if isinstance(error, OSError):
            assert str(tmp_path / files[calls]) in str(caught.value)
            assert "free some space" in str(caught.value)
        assert listing(tmp_path) == expected(0)
        assert [row["seed"] for row in rows(tmp_path)] == [1]
        assert writer.write(pair(3)) == 1
    assert [row["seed"] for row in rows(tmp_path)] == [1, 3]
    assert listing(tmp_path) == expected(0, 1)


def test_a_second_stream_into_the_same_writer_draws_nothing_again(tmp_path: Path) -> None:
    made = pair(1)
    with FolderWriter(tmp_path) as writer:
        assert writer.missing([made.recipe], [1, 2], free=False) == [(0, 1), (1, 2)]
        writer.write(made)
        assert writer.missing([made.recipe], [1, 2], free=False) == [(1, 2)]


def own(picture: str, **changed: Any) -> dict[str, Any]:
    """A recipe of a run whose pairs have pictures of their own."""
    return {"placement": {"picture_sha256": picture, "edge": 2.0, **changed}}


def placed(seed: int, recipe: dict[str, Any]) -> Pair:
    return replace(pair(seed), recipe={**recipe, "seed": seed})


def test_pairs_with_pictures_of_their_own_are_one_run(tmp_path: Path) -> None:
    recipes = [own("a"), own("b"), own("c")]
    with FolderWriter(tmp_path) as writer:
        assert writer.missing(recipes, [1, 2, 3], free=False) == [(0, 1), (1, 2), (2, 3)]
        writer.write(placed(2, recipes[1]))
        assert writer.missing(recipes, [1, 2, 3], free=False) == [(0, 1), (2, 3)]
        # more pairs on other pictures join them
        assert writer.missing([own("d"), own("e")], [4, 5], free=False) == [(0, 4), (1, 5)]
        # another picture for a seed that is there does not
        with pytest.raises(OutputError, match="other picture or region for seed 2"):
            writer.missing([own("a"), own("z")], [1, 2], free=False)
        # nor do other settings
        changed = [own("a", edge=1.0), own("b", edge=1.0)]
        with pytest.raises(OutputError, match="other placement"):
            writer.missing(changed, [7, 8], free=False)
        # one picture for all is another run
        with pytest.raises(OutputError, match="other placement"):
            writer.missing([own("a")], [7, 8], free=False)
    with FolderWriter(tmp_path, append=True) as writer:
        assert writer.missing([own("z")], [2], free=False) == [(0, 2)]


def test_a_lost_pair_is_replaced_by_its_own_picture_only(tmp_path: Path) -> None:
    """Two pairs of one seed on two pictures, of which one is damaged."""
    with FolderWriter(tmp_path, append=True) as writer:
        writer.write(placed(1, own("a")))
        writer.write(placed(1, own("b")))
        (tmp_path / "mask" / "00001.png").unlink()
        assert writer.missing([own("c"), own("b")], [1, 2], free=False) == [(0, 1), (1, 2)]
        assert writer.write(placed(1, own("c"))) == 2
        assert writer.missing([own("b")], [1], free=False) == [(0, 1)]
        assert writer.write(placed(1, own("b"))) == 1


def test_free_seeds_fill_up_every_picture(tmp_path: Path) -> None:
    recipes = [own("a"), own("b"), own("a"), own("c")]
    with FolderWriter(tmp_path) as writer:
        assert len(writer.missing(recipes, [11, 12, 13, 14], free=True)) == 4
        for seed, recipe in ((11, recipes[0]), (12, recipes[1]), (13, recipes[0])):
            writer.write(placed(seed, recipe))
        assert writer.missing(recipes, [21, 22, 23, 24], free=True) == [(3, 24)]
        assert writer.present == 3
        (tmp_path / "image" / "00001.png").write_bytes(b"damaged")
        # the pair of picture b again, by its own seed
        assert writer.missing(recipes, [21, 22, 23, 24], free=True) == [(1, 12), (3, 24)]
