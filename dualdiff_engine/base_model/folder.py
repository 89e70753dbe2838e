"""Find a base model's folder and its files, and read JSON that somebody else wrote."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import BaseModelError, DualDiffError

# of a folder with exported graphs in place of a base model's weights
BUNDLE = "bundle.json"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# of the weight files of a part, as diffusers and transformers name them
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
# full precision first
_VARIANTS = ("", ".fp16", ".bf16")
# a vocabulary of 50,000 tokens has 1 MB, an index of shards 0.1 MB
_MAX_JSON_BYTES = 32 << 20
_LFS = b"version https://git-lfs"
AGAIN = "download the base model again"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")
_HALF = (".incomplete", ".part", ".partial", ".crdownload", ".aria2", ".tmp", ".download")


def find(source: str | Path, revision: str | None, local_files_only: bool) -> Path:
    """The folder of a base model: a local one, or a hub id's. Raises BaseModelError."""
    path, name = Path(source), str(source)
    try:
        if path.is_dir():
            return path
        exists = os.path.lexists(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BaseModelError(f"no base model at {name[:80]!r}: {reason}") from error
    if exists or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseModelError(
            f"no base model at {name[:200]!r}: pass a diffusers folder or a hub id"
        )
    folder = _download(name, revision, local_files_only, "")
    if any(not _candidates(folder / part, stem) for part, stem in STEMS.items()):
        # saved in half precision alone
        folder = _download(name, revision, local_files_only, ".fp16")
    return folder


def _download(name: str, revision: str | None, local_files_only: bool, variant: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "*/*.json", "tokenizer/*"]
    for part, stem in STEMS.items():
        wanted += [f"{part}/{stem}{variant}.safetensors", f"{part}/{stem}{variant}-*.safetensors"]
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=wanted, local_files_only=local_files_only
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"no folder {name!r}, and it could not be downloaded: {first_line(error)}"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]


@contextmanager
def blamed_on(
    where: Path | str, remedy: str = AGAIN, kind: type[DualDiffError] = BaseModelError
) -> Iterator[None]:
    """Turn whatever another library raises about a folder or a file into one error of a kind."""
    try:
        yield
    except (DualDiffError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    # tokenizers is Rust, and its panics are no `Exception`
    except BaseException as error:
        raise kind(
            f"{where} cannot be loaded ({type(error).__name__}: {first_line(error)}): {remedy}"
        ) from error


def check_file(path: Path) -> int:
    """The size of a regular file with content. Raises BaseModelError; never waits for a pipe."""
    try:
        info = path.stat()
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            raise BaseModelError(f"{path} is missing: {AGAIN}") from error
        reason = getattr(error, "strerror", None) or error
        raise BaseModelError(
            f"{path} cannot be read ({reason}): check the link and its permissions, or {AGAIN}"
        ) from error
    if not stat.S_ISREG(info.st_mode):
        raise BaseModelError(f"{path} is not a regular file: {AGAIN}")
    if info.st_size == 0:
        raise BaseModelError(f"{path} is empty: {AGAIN}")
    with _readable(path), path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise BaseModelError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or {AGAIN}"
            )
    return info.st_size


def check_files(folder: Path) -> None:
    """As `check_file`, of every file of a folder that another library reads on its own."""
    with _readable(folder):
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in paths:
        if not path.is_dir() and check_file(path) > _MAX_JSON_BYTES:
            raise BaseModelError(f"{path} is too large for a tokenizer's file: {AGAIN}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BaseModelError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError."""
    size = check_file(path)
    if size > _MAX_JSON_BYTES:
        raise BaseModelError(f"{path} has {size:,} bytes, too many for a JSON file: {AGAIN}")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path} cannot be read as JSON ({error}): {AGAIN}") from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} is not a JSON object: {AGAIN}")
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON value")


def _candidates(folder: Path, stem: str) -> list[Path]:
    """Whole files and indices of shards, the best first."""
    names: list[str] = []
    for variant in _VARIANTS:
        names.append(f"{stem}{variant}.safetensors")
        # diffusers and transformers put the variant behind `index`, older ones before it
        names.append(f"{stem}.safetensors.index{variant}.json")
        names.append(f"{stem}{variant}.safetensors.index.json")
    return [folder / name for name in dict.fromkeys(names) if os.path.lexists(folder / name)]


def weights_file(folder: Path, stem: str) -> Path:
    """A part's safetensors file, or the index of its shards. Raises BaseModelError."""
    if candidates := _candidates(folder, stem):
        check_file(candidates[0])
        return candidates[0]
    with _readable(folder):
        names = sorted(path.name for path in folder.iterdir())
    wanted = f"{folder} has no {stem}.safetensors"
    if half := [name for name in names if name.endswith(_HALF)]:
        raise BaseModelError(f"{wanted}; {half[0]} is a half download: {AGAIN}")
    if others := [name for name in names if name.endswith(".safetensors")]:
        shards = [name for name in others if "-of-" in name]
        reason = f"{others[0]} has another name: rename it if it is the right file"
        if shards:
            reason = f"{shards[0]} is a shard without its index: {AGAIN}"
        raise BaseModelError(f"{wanted}; {reason}")
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        raise BaseModelError(
            f"{wanted}; pickled weights ({pickles[0]}) are not read: save the model with "
            "safe_serialization=True"
        )
    raise BaseModelError(f"{wanted}: {AGAIN}")


def check_index(folder: Path) -> None:
    """Compare `model_index.json`, where there is one, with what the parts have to be."""
    path = folder / "model_index.json"
    if not os.path.lexists(path):
        return
    index = read_json(path)
    wanted = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    for part, classes in wanted.items():
        named = index.get(part)
        kind = named[1] if isinstance(named, list) and len(named) == 2 else named
        if part in index and kind not in classes:
            raise BaseModelError(
                f"{path}: {part} is {str(named)[:80]}; expected {classes[0]}: pass an SD-1.x or "
                "SD-2.x model"
            )
    for part in ("text_encoder_2", "transformer", "prior"):
        if index.get(part) not in (None, [None, None]):
            raise BaseModelError(f"{path} has a {part}: pass an SD-1.x or SD-2.x model")
