"""Folders -> checked samples: what `dualdiff generate` writes, or pictures in MVTec layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.folder_writer import MANIFEST
from dualdiff_engine.pictures import open_picture
from dualdiff_engine.training.data import find_examples, pictures_in
from dualdiff_engine.training.options import TrainingOptions

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]

# of a pixel that the mask has to cover to count when a picture is reduced: a scratch as wide as a
# third of the new pixel stays
LEAST_SHARE = 1 / 3
_MOST_TOLD = 20


@dataclass(frozen=True)
class Sample:
    """Files of one defective picture.

    anomaly: the defect alone, None for real pictures. object_mask: the part in white, where known.
    defect: samples of one defect share it.
    """

    image: Path
    mask: Path
    anomaly: Path | None
    object_mask: Path | None
    defect: str

    def pixels(self) -> Bytes:
        """uint8 [H, W, 3]."""
        return _decoded(self.image, "image", "RGB")

    def flags(self) -> Flags:
        """bool [H, W], true on the defect."""
        return _decoded(self.mask, "mask", "L") > 127


def find_pairs(
    root: str | Path, *, object_mask: str | Path | None = None, fewest: int = 2
) -> list[Sample]:
    """Find pairs in a folder that `dualdiff generate` wrote, or in one in MVTec layout.

    The first has `image/`, `mask/`, optionally `anomaly/` and `object_mask/` (same file names), and
    as a rule `manifest.jsonl`, which lists the pairs and distinguishes defects by their adapters.

    Args:
        root: the folder.
        object_mask: one object mask for all pairs, in white.
        fewest: the least number of pairs.

    Returns:
        The pairs, in the order of the manifest or of their names.

    Raises:
        DataError: the folder has neither layout or too few pairs, files are missing, unreadable or
            of different sizes, or every mask is empty.
        SettingsError: `object_mask` cannot be read.
    """
    root = Path(root)
    if (root / "image").is_dir():
        samples = _of_run(root)
    elif (root / "test").is_dir():
        samples = find_real(root)
    else:
        raise DataError(
            f"{root} holds no pairs: pass a folder that `dualdiff generate` wrote (image/, mask/) "
            "or one in MVTec layout (test/, ground_truth/)"
        )
    if len(samples) < fewest:
        raise DataError(
            f"{root}: {len(samples)} pairs found, at least {fewest} are needed: draw more"
        )
    if object_mask is not None:
        open_picture(object_mask, "object mask", "L")
        samples = [replace(sample, object_mask=Path(object_mask)) for sample in samples]
    check_files(root, samples)
    if not any(sample.flags().any() for sample in samples):
        raise DataError(
            f"{root}: every mask is empty, so nothing can be measured: draw other pairs"
        )
    return samples


def find_real(root: str | Path, defect: str | None = None) -> list[Sample]:
    """Find real pictures with masks in MVTec layout.

    Args:
        root: the folder that holds `test/` and `ground_truth/`.
        defect: a folder in `test/`; None takes all but `good`.

    Returns:
        The pictures, sorted by defect and name.

    Raises:
        DataError: files are missing or unusable; one line per fault.
        SettingsError: `defect` is not the name of a folder.
    """
    root = Path(root)
    names = [defect] if defect else sorted(p.name for p in (root / "test").glob("*") if p.is_dir())
    samples = []
    for name in (n for n in names if n != "good"):
        for example in find_examples(root, TrainingOptions(defect=name)):
            whole = root / "object_mask" / name / f"{example.picture.stem}_mask.png"
            known = whole if whole.is_file() else None
            samples.append(Sample(example.picture, example.mask, None, known, name))
    if not samples:
        raise DataError(f"{root} is not in MVTec layout: expected {root}/test/<defect>/*.png")
    return samples


def find_good(root: str | Path, part: str, fewest: int = 2) -> list[Path]:
    """Good pictures of `train` or `test`. Raises DataError for fewer than `fewest`."""
    folder = Path(root) / part / "good"
    found = pictures_in(folder)
    if len(found) < fewest:
        raise DataError(
            f"{folder}: {len(found)} good pictures found, at least {fewest} are needed: add more"
        )
    return found


def check_files(root: Path, samples: Sequence[Sample]) -> None:
    """Raises DataError that lists what is missing, unreadable or of another size than its image."""
    faults = [fault for sample in samples for fault in _faults(sample)]
    if faults:
        more = [f"… and {len(faults) - _MOST_TOLD} more"] if len(faults) > _MOST_TOLD else []
        raise DataError("\n".join([f"{root}: unusable pairs", *faults[:_MOST_TOLD], *more]))


def load_reduced(samples: Sequence[Sample], size: int) -> tuple[Bytes, Flags]:
    """Images uint8 [N, size, size, 3] and masks bool [N, size, size]."""
    images = np.stack([reduced(sample.pixels(), size) for sample in samples])
    masks = np.stack([reduced_mask(sample.flags(), size) for sample in samples])
    return images, masks


def load_pictures(paths: Sequence[Path], size: int) -> Bytes:
    """uint8 [N, size, size, 3]."""
    return np.stack([reduced(_decoded(path, "picture", "RGB"), size) for path in paths])


def reduced(picture: Bytes, size: int) -> Bytes:
    """uint8 [H, W, 3] -> uint8 [size, size, 3], averaged over areas where that is smaller."""
    smaller = picture.shape[0] >= size and picture.shape[1] >= size
    method = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(picture, (size, size), interpolation=method), np.uint8)


def reduced_mask(mask: Flags, size: int) -> Flags:
    """bool [H, W] -> bool [size, size]: pixels at least a third covered."""
    share = cv2.resize(mask.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(share >= LEAST_SHARE)


def _of_run(root: Path) -> list[Sample]:
    if (root / MANIFEST).is_file():
        rows = list(_rows(root / MANIFEST))
    else:
        rows = [(path.name, "all") for path in pictures_in(root / "image")]
        _refuse_others(root, {name for name, _ in rows})
    extra = {kind: (root / kind).is_dir() for kind in ("anomaly", "object_mask")}
    return [
        Sample(
            root / "image" / name,
            root / "mask" / name,
            root / "anomaly" / name if extra["anomaly"] else None,
            root / "object_mask" / name if extra["object_mask"] else None,
            defect,
        )
        for name, defect in rows
    ]


def _refuse_others(root: Path, names: set[str]) -> None:
    """Without a manifest, a mask without an image is a mistake; the reverse is found later."""
    for kind in ("mask", "anomaly"):
        for path in pictures_in(root / kind):
            if path.name not in names:
                raise DataError(
                    f"{path}: {root / 'image'} has no image of this name: add it or remove "
                    "this file"
                )


def _rows(manifest: Path) -> Iterator[tuple[str, str]]:
    """File name and defect of every row; a last line cut off by a crash is none."""
    lines = manifest.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            file = str(row["files"]["image"])
            adapter = row["recipe"]["adapter"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if number == len(lines):
                return
            raise DataError(f"{manifest}: line {number} is damaged: draw the run again") from error
        name = file.removeprefix("image/")
        if not name or "/" in name or "\\" in name or name == "..":
            raise DataError(
                f"{manifest}: line {number} has image path {file!r}, expected image/NAME"
            )
        yield name, _defect(adapter)


def _defect(adapter: Any) -> str:
    """The folder of the adapter and the start of its sha256, which alone tells two apart."""
    if not isinstance(adapter, dict):
        return "all"
    parts = str(adapter.get("source", "")).replace("\\", "/").rstrip("/").split("/")
    folder = parts[-2] if len(parts) > 1 and "." in parts[-1] else parts[-1]
    return f"{folder} {str(adapter.get('sha256', ''))[:8]}".strip() or "all"


def _faults(sample: Sample) -> list[str]:
    try:
        size = _size(sample.image)
    except (OSError, SyntaxError, ValueError):
        state = "is not a readable picture" if sample.image.is_file() else "is missing"
        return [f"{sample.image} {state}"]
    faults = []
    for path in (sample.mask, sample.anomaly, sample.object_mask):
        if path is None:
            continue
        try:
            other = _size(path)
        except (OSError, SyntaxError, ValueError):
            state = "is not a readable picture" if path.is_file() else "is missing"
            faults.append(f"{path} {state}; it belongs to {sample.image}")
            continue
        if other != size:
            faults.append(f"{path} has size {other}, its image {size}: make them equal")
    return faults


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone."""
    with Image.open(path) as picture:
        return picture.size


def _decoded(path: Path, kind: str, mode: str) -> Bytes:
    try:
        return np.asarray(open_picture(path, kind, mode))
    except (SettingsError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {kind} cannot be read ({error}): save it again") from error
