"""Write pairs as numbered files with a manifest that stays correct after a crash."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.files import partial_name, sync
from dualdiff_engine.pair import Fault, Pair, differences, identity
from dualdiff_engine.pictures import is_whole_png

MANIFEST = "manifest.jsonl"
QUARANTINE = "quarantine.jsonl"
# what a pair consists of, each in a folder of its own, and the PIL mode it comes in
KINDS = {"image": "RGB", "anomaly": "RGB", "mask": "L"}

_HELD = "another run is writing to it, wait for it or choose another folder"
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
    that it holds is continued: hand the writer to `Engine.stream(resume=…)`, and only the missing
    pairs are drawn. A row has `index`, `files` (kind -> path relative to root, with slashes),
    `seed`, `empty_mask`, `scores`, `accepted` and `recipe`; it is written after its files. Pairs
    that came out unusable are set aside in `root/quarantine.jsonl`, with the reason.

    Args:
        root: The folder; made if it is not there.
        append: Whether pairs of another recipe may join those that are there.

    Raises:
        OutputError: On entering, when the folder cannot be written or is in use, when a symlink
            leads out of it, or when its manifest is damaged or does not list its numbered pictures.
    """

    def __init__(self, root: str | Path, *, append: bool = False) -> None:
        if not str(root):
            raise SettingsError("the output folder has no name: pass a path")
        self.root, self.append = Path(root), append
        # of pairs that the last `missing` found in the folder, and of those set aside there
        self.present = self.set_aside = 0
        self._next = 0
        self._manifest: io.FileIO | None = None
        self._rows: list[Row] = []
        # rows whose pictures are gone or damaged, by recipe and seed: their pairs are drawn again
        self._lost: dict[tuple[str, int], Row] = {}

    def __enter__(self) -> FolderWriter:
        path = self.root / MANIFEST
        with ExitStack() as opened, _naming(self.root):
            self._make_folders()
            if not path.exists():
                self._refuse_pictures_from(0)
            manifest = opened.enter_context(path.open("a+b", buffering=0))
            lock(manifest)
            self._rows = _repair(path, manifest)
            self._next = max((row.index + 1 for row in self._rows), default=0)
            # the next number itself may be there: a pair whose row was never written
            self._refuse_pictures_from(self._next + 1)
            opened.pop_all()
        self._manifest = manifest
        return self

    def __exit__(self, *error: object) -> None:
        if self._manifest is not None:
            self._manifest.close()
            self._manifest = None

    @property
    def last_recipe(self) -> Mapping[str, Any] | None:
        """The recipe of the last pair in the folder, None where there is no pair."""
        return self._rows[-1].recipe if self._rows else None

    def missing(
        self, recipes: Sequence[Mapping[str, Any]], seeds: Sequence[int], free: bool
    ) -> list[tuple[int, int]]:
        """The pairs that are not in the folder yet, each as its number and its seed.

        Args:
            recipes: One per seed, or one for all.
            seeds: What was asked for, in order.
            free: Whether only their number was asked for: pairs that are there count.

        Raises:
            OutputError: The folder holds pairs of another recipe, and `append` is off.
            SettingsError: A seed is asked for twice.
        """
        if twice := [seed for seed, count in Counter(seeds).items() if count > 1]:
            raise SettingsError(f"seed {twice[0]} is given twice: give every seed once")
        own = [_key(identity(recipe)) for recipe in recipes]
        asked = own * len(seeds) if len(own) == 1 else own
        self._refuse_others(recipes, dict(zip(seeds, asked, strict=True)), free)
        rows, wanted = [(_key(identity(row.recipe)), row) for row in self._rows], set(own)
        ours = [(key, row) for key, row in rows if key in wanted]
        self._lost = {(key, row.seed): row for key, row in ours if not self._whole(row)}
        there = {(key, row.seed) for key, row in ours} - self._lost.keys()
        gone = {(_key(identity(row.recipe)), row.seed) for row in self._quarantined()}
        pairs = list(zip(asked, seeds, strict=True))
        if free:
            self.set_aside = 0
            return self._fill_up(pairs, there, gone)
        self.present = len(there & set(pairs))
        self.set_aside = len(gone & set(pairs))
        done = there | gone
        return [(number, pair[1]) for number, pair in enumerate(pairs) if pair not in done]

    def _fill_up(
        self,
        pairs: Sequence[tuple[str, int]],
        there: set[tuple[str, int]],
        gone: set[tuple[str, int]],
    ) -> list[tuple[int, int]]:
        """Pairs to draw so that every recipe is there as often as it is asked for, by any seeds."""
        counts, done = Counter(key for key, _ in there), there | gone
        again: dict[str, list[int]] = {key: [] for key, _ in pairs}
        for key, seed in self._lost:
            again[key].append(seed)
        wanted = []
        for number, (key, seed) in enumerate(pairs):
            if counts[key]:
                counts[key] -= 1
            elif again[key]:
                wanted.append((number, again[key].pop(0)))
            elif (key, seed) not in done:
                wanted.append((number, seed))
        self.present = len(pairs) - len(wanted)
        return wanted

    def _refuse_others(
        self, recipes: Sequence[Mapping[str, Any]], asked: Mapping[int, str], free: bool
    ) -> None:
        """Raises OutputError when a row belongs to no run of these recipes.

        Where pairs have pictures of their own, rows of seeds that are not asked for may have any.
        """
        if self.append:
            return
        first, shared = identity(recipes[0]), identity(recipes[0], pictures=False)
        one_recipe = len(set(asked.values())) == 1
        for row in self._rows:
            theirs = identity(row.recipe)
            if one_recipe:
                others = differences(first, theirs)
            else:
                others = differences(shared, identity(row.recipe, pictures=False))
                own = None if free else asked.get(row.seed)
                if not others and own is not None and own != _key(theirs):
                    others = [f"picture or region for seed {row.seed}"]
            if others:
                raise OutputError(
                    f"{self.root} holds pairs of another recipe (other {', '.join(others)}): "
                    "choose another folder, or pass append=True to add to it"
                )

    def write(self, pair: Pair) -> int:
        """Write a pair, whole or not at all.

        Args:
            pair: generated with `output_type="pil"`.

        Returns:
            Its index, from 0.

        Raises:
            SettingsError: the pair has another output type.
            OutputError: a file cannot be written.
        """
        assert self._manifest is not None, "use FolderWriter as a context manager"
        lost = self._lost.pop((_key(identity(pair.recipe)), pair.seed), None)
        index = self._next if lost is None else lost.index
        files = files_of(index)
        contents = {self.root / file: png_of(pair, kind) for kind, file in files.items()}
        names = ("seed", "empty_mask", "scores", "accepted", "recipe")
        record = {name: getattr(pair, name) for name in names}
        line = json.dumps({"index": index, "files": files, **record}).encode() + b"\n"
        self._check_manifest()
        end = os.fstat(self._manifest.fileno()).st_size
        try:
            _place(contents)
            if lost is None:
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
        if lost is None:
            # a second stream into the same writer must not draw it again
            self._rows.append(Row(index, pair.seed, pair.recipe))
            self._next += 1
        return index

    def quarantine(self, fault: Fault) -> None:
        """Note a pair that came out unusable: `Engine.stream(on_fault=…)`. Raises OutputError."""
        path = self.root / QUARANTINE
        line = json.dumps({"seed": fault.seed, "reason": fault.reason, "recipe": fault.recipe})
        with _naming(path), path.open("ab", buffering=0) as file:
            _append(file, line.encode() + b"\n")
        self.set_aside += 1

    def _quarantined(self) -> list[Row]:
        path = self.root / QUARANTINE
        if not path.is_file():
            return []
        with _naming(path), path.open("rb") as lines:
            rows = [_row_of(line, index=0) for line in lines]
        return [row for row in rows if row is not None]

    def _whole(self, row: Row) -> bool:
        """Whether the pictures of a row are there and undamaged."""
        return all(is_whole_png(self.root / file) for file in files_of(row.index).values())

    def _check_manifest(self) -> None:
        """Raises OutputError when the manifest was removed or replaced since it was opened."""
        assert self._manifest is not None
        path, own = self.root / MANIFEST, os.fstat(self._manifest.fileno())
        try:
            now = path.stat()
        except OSError:
            now = None
        if now is None or (now.st_ino, now.st_dev) != (own.st_ino, own.st_dev):
            raise OutputError(
                f"{path} was removed or replaced while this run was writing: run again in a folder "
                "of its own"
            )

    def _make_folders(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        for name in (*KINDS, MANIFEST, QUARANTINE):
            if (self.root / name).is_symlink():
                raise OutputError(f"{self.root / name} is a symbolic link: choose another folder")
        for path in (self.root / MANIFEST, self.root / QUARANTINE):
            # a pipe would be waited for
            if path.exists() and not path.is_file():
                raise OutputError(f"{path} is not a regular file: choose another folder")
        for kind in KINDS:
            (self.root / kind).mkdir(exist_ok=True)
            if not os.access(self.root / kind, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, f"{kind}/: {os.strerror(errno.EACCES)}")

    def _refuse_pictures_from(self, first: int) -> None:
        """Refuse numbered pictures that no run of ours can have written: they are somebody's."""
        for path in (path for kind in KINDS for path in (self.root / kind).iterdir()):
            if path.suffix == ".png" and path.stem.isdecimal() and int(path.stem) >= first:
                raise OutputError(f"{path} is not listed in {MANIFEST}: choose another folder")


def _key(identity: Mapping[str, str]) -> str:
    return json.dumps(identity, sort_keys=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn errors of the system into one line that names the path and the remedy."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose another folder or make this one writable")
        raise OutputError(f"{path} cannot be written ({error.strerror}): {remedy}") from error


@dataclass(frozen=True)
class Row:
    """What a manifest says of a pair."""

    index: int
    seed: int
    recipe: Mapping[str, Any]


def files_of(index: int) -> dict[str, str]:
    """Kind -> path of a picture, relative to the folder."""
    return {kind: f"{kind}/{index:05d}.png" for kind in KINDS}


def _repair(path: Path, manifest: io.FileIO) -> list[Row]:
    """The rows, the last line mended after a crash."""
    rows, indices, end = [], set[int](), 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            row = _row_of(line)
            if row is None and line.endswith(b"\n"):
                raise OutputError(f"{path}: line {number} is damaged: choose another folder")
            if row is not None and row.index in indices:
                raise OutputError(
                    f"{path}: line {number} lists pair {row.index} again: remove one of the two "
                    "lines, or choose another folder"
                )
            if row is None:
                manifest.truncate(end)
                break
            rows.append(row)
            indices.add(row.index)
            end += len(line)
            if not line.endswith(b"\n"):
                manifest.write(b"\n")
                break
    return rows


def _row_of(line: bytes, index: int | None = None) -> Row | None:
    """A row of a manifest, None if the line is not one; index: where a line has none of its own."""
    try:
        content = json.loads(line)
        index = content["index"] if index is None else index
        seed, recipe = content.get("seed", -1), content.get("recipe", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    fits = type(index) is int and index >= 0 and type(seed) is int and isinstance(recipe, dict)
    if not fits:
        return None
    # a number that changed is told by what is written twice
    files = files_of(index)
    agrees = recipe.get("seed", seed) == seed and content.get("files", files) == files
    return Row(index, seed, recipe) if agrees else None


def png_of(pair: Pair, kind: str) -> bytes:
    """A picture of a pair as a PNG file. Raises SettingsError for another output type than pil."""
    picture = getattr(pair, kind)
    if not isinstance(picture, Image.Image) or picture.mode != KINDS[kind]:
        raise SettingsError("FolderWriter needs pairs generated with output_type='pil'")
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
    for folder in {target.parent for target in contents}:
        # the names, too, are on the disk before the row that lists them
        with _naming(folder):
            sync(folder)


def _append(manifest: io.FileIO, line: bytes) -> None:
    # a nearly full disk takes a part and refuses the rest
    while line:
        line = line[manifest.write(line) :]
    os.fsync(manifest.fileno())
