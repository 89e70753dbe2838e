"""Where a dataset's files are, and how each is written whole or not at all.

job.json  run.json  plan.jsonl  tally.json      the job, what decides about pixels, the plan
parts/WRITER.jsonl                              rows of pairs, one file per writer
recipes/HASH.json                               what rows share
started/WRITER.jsonl  workers/WRITER.json       batches begun; signs of life
fences/SHARD                                    the run that may write now
partial/WRITER/                                 files that have no name yet
store/PRODUCT/DEFECT/{image,anomaly,mask}/NNNNNN.png
quarantine/PRODUCT/DEFECT/{image,anomaly,mask}/NNNNNN-ATTEMPT.png
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import OutputError

JOB, RUN, PLAN, TALLY = "job.json", "run.json", "plan.jsonl", "tally.json"
PARTS, RECIPES, STARTED, WORKERS = "parts", "recipes", "started", "workers"
FENCES, PARTIAL, STORE, QUARANTINE = "fences", "partial", "store", "quarantine"
FOLDERS = (PARTS, RECIPES, STARTED, WORKERS, FENCES, PARTIAL, STORE, QUARANTINE)
KINDS = ("image", "anomaly", "mask")
# of the files that are read whole
_MOST_BYTES = 64 << 20

_FULL = "free some space and run again; finished pairs are kept"
_REMEDIES = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn errors of the system into one line that names the path and the remedy."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "choose another out or make this one writable")
        raise OutputError(f"{path} cannot be written ({error.strerror}): {remedy}") from error


def make_folders(root: Path) -> None:
    """Make what a dataset needs. Raises OutputError, for symbolic links too."""
    with naming(root):
        root.mkdir(parents=True, exist_ok=True)
        for name in (JOB, RUN, PLAN, TALLY, *FOLDERS):
            if (root / name).is_symlink():
                raise OutputError(f"{root / name} is a symbolic link: choose another out")
        _refuse_strangers(root)
        for name in FOLDERS:
            (root / name).mkdir(exist_ok=True)
            if not os.access(root / name, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _refuse_strangers(root: Path) -> None:
    """Raises OutputError for a folder that holds other things than a dataset."""
    if (root / RUN).is_file() or (root / FENCES).is_dir():
        return
    own = {JOB, RUN, PLAN, TALLY, *FOLDERS}
    if others := sorted(path.name for path in root.iterdir() if path.name not in own):
        raise OutputError(f"{root} holds {others[0]} and no dataset: choose an empty folder")


def require_dataset(root: Path) -> None:
    """Raises OutputError where there is no dataset."""
    if not (root / RUN).is_file():
        raise OutputError(f"{root} holds no dataset: pass the folder that a job names under out")


def pictures_of(root: Path, defect: str, number: int) -> dict[str, Path]:
    """Kind -> file of an accepted pair."""
    return {kind: root / STORE / defect / kind / f"{number:06d}.png" for kind in KINDS}


def quarantined(root: Path, defect: str, number: int, attempt: int) -> dict[str, Path]:
    """Kind -> file of a rejected pair."""
    name = f"{number:06d}-{attempt}.png"
    return {kind: root / QUARANTINE / defect / kind / name for kind in KINDS}


def put(root: Path, writer: str, name: str, content: Iterable[bytes], *, keep: bool = True) -> None:
    """Write a file whole or not at all, beside other writers of it. Raises OutputError.

    keep: whether it has to outlive the machine's going down.
    """
    # it loads PyTorch, which readers do not need
    from dualdiff_engine.files import sync

    target, partial = root / name, root / PARTIAL / writer / name.replace("/", "-")
    with naming(target):
        partial.parent.mkdir(exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(content)
            if keep:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(target)
        if keep:
            sync(target.parent)


def put_json(root: Path, writer: str, name: str, content: Any, *, keep: bool = True) -> None:
    """The same of a value."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    put(root, writer, name, [text.encode() + b"\n"], keep=keep)


def read_json(path: Path) -> Any:
    """The value in a file, None where there is no such file. Raises OutputError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError
        return json.loads(content)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise OutputError(f"{path} is damaged: remove it and run make again") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be read ({error.strerror}): check it") from error


def set_fence(root: Path, writer: str, shard: str, run: str, *, whole: bool) -> None:
    """From now on this run writes its shard, and older ones stop; whole: of every shard."""
    for path in (root / FENCES).iterdir() if whole else ():
        with suppress(OSError):
            path.unlink()
    put(root, writer, f"{FENCES}/{shard}", [run.encode()])


def is_fenced(root: Path, shard: str, run: str) -> bool:
    """Whether a newer run has taken over."""
    try:
        return (root / FENCES / shard).read_bytes() != run.encode()
    except OSError:
        return True


def remove_dead(root: Path) -> None:
    """Remove what runs that are over leave: files without a name, signs of life."""
    live = set()
    for path in (root / FENCES).iterdir():
        with suppress(OSError):
            live.add(path.read_text("utf-8"))
    for path in (root / PARTIAL).iterdir():
        if path.name.partition("-")[0] not in live:
            shutil.rmtree(path, ignore_errors=True)
    for path in (*(root / STARTED).iterdir(), *(root / WORKERS).iterdir()):
        if path.name.partition("-")[0] not in live:
            with suppress(OSError):
                path.unlink()
