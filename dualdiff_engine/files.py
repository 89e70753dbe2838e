"""Files written whole or not at all, and hashes of files and tensors."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dualdiff_engine.errors import OutputError

PARTIAL = ".partial"


def partial_name(path: Path) -> Path:
    """Where the content of `path` is written before it gets its name."""
    return path.with_name(path.name + PARTIAL)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give the caller a temporary path; rename it to `path` if the block succeeds.

    After a crash there is the old file or the new one, never a part. When the block is left, the
    file is on the disk under its name: what is written next may rely on it. What lies at the
    temporary path, a symlink included, is removed and not written through.
    Raises OutputError when the file cannot be written.
    """
    # a folder: safetensors puts a file of its own next to the one it writes, and a kill leaves both
    scratch = partial_name(path)
    partial = scratch / path.name
    folder = path.parent
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        _remove(scratch)
        scratch.mkdir()
        yield partial
        # the machine may go down, too: the content is on the disk before it has the name
        sync(partial)
        partial.replace(path)
        sync(folder)
        if is_new:
            sync(folder.parent)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"{path} cannot be written ({reason}): free some space or choose another place"
        ) from error
    finally:
        with suppress(OSError):
            _remove(scratch)


def _remove(path: Path) -> None:
    """Whatever lies there; a symlink is not followed. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of their names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(content.numpy().data)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(root: Path, needed: int, what: str) -> int:
    """The free bytes of the disk where `root` is or will be.

    Raises OutputError when they are fewer than `needed`, which `what` may take.
    """
    at = root
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        free = shutil.disk_usage(at).free
    except OSError as error:
        raise OutputError(f"{root} cannot be used ({error.strerror}): choose another") from error
    if free < needed:
        raise OutputError(
            f"{root}: {what} may take {in_words(needed)} and {in_words(free)} are free: free "
            "some space, or choose another out"
        )
    return free


def in_words(size: float) -> str:
    """Bytes for people: 1.5 GiB."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        del units[0]
    unit = units[0]
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
