"""Pairs -> numbered files, and a manifest that stays true through a crash."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.files import partial_name

if TYPE_CHECKING:
    from dualdiff_engine.pair import Pair

MANIFEST = "manifest.jsonl"
# what a pair consists of, each in a folder of its own, and the PIL mode it comes in
KINDS = {"image": "RGB", "anomaly": "RGB", "mask": "L"}

_HELD = "another run is writing there, wait for it or choose another folder"
_FULL = "free some space and run again; finished pairs are kept"
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _FULL) | {errno.EAGAIN: _HELD}

if sys.platform == "win32":
    import msvcrt

    def lock(file: io.FileIO) -> None:
        # windows lets nobody read a locked byte: take one that no manifest reaches
        file.seek(0x7FFFFFFE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def lock(file: io.FileIO) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


class FolderWriter:
    """Writes `root/{image,anomaly,mask}/NNNNN.png` and one row per pair to `root/manifest.jsonl`.

    A context manager: entering checks the folder before anything is computed, and locks it. A run
    that it holds is continued after its last row. A row has `index`, `files` (kind -> path relative
    to root, with slashes), `seed`, `empty_mask` and `recipe`; it follows its files to the disk.
    Entering raises OutputError when the folder cannot be written or is in use, when a symlink leads
    out of it, and when its manifest is damaged or does not list its numbered pictures.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._next = 0
        self._manifest: io.FileIO | None = None

    def __enter__(self) -> FolderWriter:
        path = self.root / MANIFEST
        with ExitStack() as opened, _naming(self.root):
            self._make_folders()
            if not path.exists():
                self._refuse_pictures_from(0)
            manifest = opened.enter_context(path.open("a+b", buffering=0))
            lock(manifest)
            self._next = _repair(path, manifest)
            # the next number itself may be there: a pair whose row was never written
            self._refuse_pictures_from(self._next + 1)
            opened.pop_all()
        self._manifest = manifest
        return self

    def __exit__(self, *error: object) -> None:
        if self._manifest is not None:
            self._manifest.close()
            self._manifest = None

    def write(self, pair: Pair) -> int:
        """Commit a pair of output_type "pil", all of it or nothing; returns its index.

        Raises SettingsError for another output_type, OutputError when a file cannot be written.
        """
        assert self._manifest is not None, "use FolderWriter as a context manager"
        index = self._next
        files = {kind: f"{kind}/{index:05d}.png" for kind in KINDS}
        contents = {self.root / file: _encode(pair, kind) for kind, file in files.items()}
        record = {name: getattr(pair, name) for name in ("seed", "empty_mask", "recipe")}
        line = json.dumps({"index": index, "files": files, **record}).encode() + b"\n"
        end = os.fstat(self._manifest.fileno()).st_size
        try:
            _place(contents)
            with _naming(self.root / MANIFEST):
                _append(self._manifest, line)
        except BaseException:
            # the row goes first: it must not outlive its files
            with suppress(OSError):
                self._manifest.truncate(end)
            for path in (p for target in contents for p in (target, partial_name(target))):
                with suppress(OSError):
                    path.unlink()
            raise
        self._next += 1
        return index

    def _make_folders(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for name in (*KINDS, MANIFEST):
            if (self.root / name).is_symlink():
                raise OutputError(f"{self.root / name} is a symlink: choose another folder")
        for kind in KINDS:
            (self.root / kind).mkdir(exist_ok=True)
            if not os.access(self.root / kind, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"{kind}/: {os.strerror(errno.EACCES)}")

    def _refuse_pictures_from(self, first: int) -> None:
        """Numbered pictures that no run of ours can have left are somebody's: keep them."""
        for path in (path for kind in KINDS for path in (self.root / kind).iterdir()):
            if path.suffix == ".png" and path.stem.isdecimal() and int(path.stem) >= first:
                raise OutputError(f"{path} is not listed in {MANIFEST}: choose another folder")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """The system's errors as one line that names the path and what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder or make this one writable")
        raise OutputError(f"{path} cannot be written ({error.strerror}): {remedy}") from error


def _repair(path: Path, manifest: io.FileIO) -> int:
    """Mend the last line after a crash; returns the index that follows the rows."""
    following = end = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            index = _index_of(line)
            if index is None and line.endswith(b"\n"):
                raise OutputError(f"{path}: line {number} is damaged: choose another folder")
            if index is None:
                manifest.truncate(end)
                break
            following = max(following, index + 1)
            end += len(line)
            if not line.endswith(b"\n"):
                manifest.write(b"\n")
                break
    return following


def last_recipe(root: str | Path) -> dict[str, Any] | None:
    """The recipe of the last pair in a folder, None where there is no pair."""
    last = b""
    with suppress(OSError), (Path(root) / MANIFEST).open("rb") as lines:
        for line in lines:
            last = line if _index_of(line) is not None else last
    recipe = json.loads(last).get("recipe") if last else None
    return recipe if isinstance(recipe, dict) else None


def _index_of(line: bytes) -> int | None:
    """The index of a manifest row, None if the line is not one."""
    try:
        index = json.loads(line)["index"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return index if type(index) is int and index >= 0 else None


def _encode(pair: Pair, kind: str) -> bytes:
    picture = getattr(pair, kind)
    if not isinstance(picture, Image.Image) or picture.mode != KINDS[kind]:
        raise SettingsError("FolderWriter takes pairs generated with output_type='pil'")
    pixels = np.asarray(picture)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()


def _place(contents: dict[Path, bytes]) -> None:
    """Write all files under partial names, then give each its own."""
    for target, content in contents.items():
        partial = partial_name(target)
        with _naming(partial):
            # what lies there, a symlink too, is replaced and never written through
            partial.unlink(missing_ok=True)
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
    for target in contents:
        with _naming(target):
            partial_name(target).replace(target)


def _append(manifest: io.FileIO, line: bytes) -> None:
    # a nearly full disk takes a part and refuses the rest
    while line:
        line = line[manifest.write(line) :]
    os.fsync(manifest.fileno())
