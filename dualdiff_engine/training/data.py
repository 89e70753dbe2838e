"""Find and check training pictures in a folder in MVTec layout. All faults are listed at once.

    DATA/test/DEFECT/NAME.png                   the picture
    DATA/ground_truth/DEFECT/NAME_mask.png      the defect in white (half of full scale or more)
    DATA/object_mask/DEFECT/NAME_mask.png       the object in white, to train with background
    DATA/train/good/NAME.png                    for sample sheets with background, together with
    DATA/object_mask/good/NAME_mask.png         their objects in white

MVTec AD has no object masks: the third and fifth are this project's extension of its layout. Every
file may have any of `SUFFIXES`, in upper or lower case. What file managers leave behind is skipped.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.files import sha256_of
from dualdiff_engine.model.coupling import MASK
from dualdiff_engine.pictures import object_mask_fault, open_picture
from dualdiff_engine.pipeline.background import blacked_out
from dualdiff_engine.pipeline.window import Window, window_around
from dualdiff_engine.settings import Background
from dualdiff_engine.training.options import TrainingOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# with one picture, an adapter cannot learn what is defect and what is surroundings
FEWEST = 2
# left behind by file managers, archives and network drives, next to names that start with a dot
_LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_MOST_TOLD = 50


@dataclass(frozen=True)
class Example:
    """A picture of the defect, its mask, and with background the mask of the object.

    window: the part of them that is trained on; None: all of them.
    """

    picture: Path
    mask: Path
    object_mask: Path | None
    window: Window | None = None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.picture, self.mask, self.object_mask) if path is not None]

    def image(self, size: int) -> np.ndarray:
        """uint8 [size, size, 3]."""
        return _resized(self._cut(open_picture(self.picture, "picture", "RGB")), size)

    def anomaly(self, size: int) -> np.ndarray:
        """The defect alone on black, uint8 [size, size, 3]; cut before resizing."""
        picture = np.array(open_picture(self.picture, "picture", "RGB"))
        picture[~_white(self.mask)] = 0
        return _resized(self._cut(Image.fromarray(picture)), size)

    def annotation(self, size: int, kind: str) -> np.ndarray:
        """What the second branch draws, uint8 [size, size, 3]: `anomaly`, or its `mask`."""
        if kind != MASK:
            return self.anomaly(size)
        white = Image.fromarray(np.where(_white(self.mask), np.uint8(255), np.uint8(0)))
        return _resized(self._cut(white.convert("RGB")), size)

    def surroundings(self, size: int | None = None) -> np.ndarray:
        """The picture with the object black, as the engine cuts it, uint8 [size, size, 3].

        Without a size, at its own.
        """
        assert self.object_mask is not None, "found with background"
        picture = self._cut(open_picture(self.picture, "picture", "RGB"))
        mask = self._cut(open_picture(self.object_mask, "object mask", "L"))
        return blacked_out(picture, mask, size or picture.height, size or picture.width)

    def _cut(self, picture: Image.Image) -> Image.Image:
        return picture if self.window is None else picture.crop(self.window.box)


def find_examples(data: str | Path, options: TrainingOptions) -> list[Example]:
    """All pictures of the defect, in the order of their names.

    Raises DataError that lists every fault of every file, a line each.
    """
    root, defect = Path(data), options.defect
    folder = root / "test" / defect
    if not folder.is_dir():
        raise DataError(_no_defect(root, defect))
    pictures = pictures_in(folder)[: options.pictures]
    faults = []
    if len(pictures) < FEWEST:
        faults.append(
            f"{folder}: {len(pictures)} pictures found, at least {FEWEST} are needed "
            "(8 are usual): add more"
        )
    examples = []
    for picture in pictures:
        try:
            example = Example(
                picture,
                mask_of(picture, root / "ground_truth" / defect),
                mask_of(picture, root / "object_mask" / defect) if options.background else None,
            )
        except DataError as error:
            faults.append(str(error))
            continue
        found = _faults(example.picture, example.mask, example.object_mask)
        if options.window is not None and not found:
            example, found = _windowed(example, options.window)
        faults += found
        examples.append(example)
    _refuse(root, faults)
    return examples


def _windowed(example: Example, ratio: float) -> tuple[Example, list[str]]:
    """With the square window around its defect, and why it cannot be used, if it cannot.

    A window that is smaller than asked for would show the defect at another scale.
    """
    mask = open_picture(example.mask, "mask", "L")
    box = mask.getbbox()
    assert box is not None, "the mask was checked"
    window = window_around(box, mask.size, (1, 1), ratio, 0)
    longer = max(box[2] - box[0], box[3] - box[1])
    side = round(ratio * longer)
    if window.width == side:
        return replace(example, window=window), []
    most = math.floor(100 * min(mask.size) / longer) / 100
    remedy = f"pass at most {most:g}" if most >= 1 else "train without window"
    return example, [
        f"{example.mask}: a window of {ratio:g} times the defect is {side} x {side} pixels, "
        f"larger than its picture ({mask.width} x {mask.height}): {remedy}"
    ]


def _refuse(root: Path, faults: list[str]) -> None:
    if faults:
        more = [f"… and {len(faults) - _MOST_TOLD} more"] if len(faults) > _MOST_TOLD else []
        raise DataError("\n".join([f"{root}: unusable data", *faults[:_MOST_TOLD], *more]))


def pictures_in(folder: Path) -> list[Path]:
    """Files with the suffix of a picture, by name, without hidden ones."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and _is_visible(path) and not path.is_dir()
    )


def defects_in(root: Path) -> list[str]:
    """Names of the folders of `root`/test but `good`, in order, without hidden ones."""
    folders = [path for path in (root / "test").glob("*") if path.is_dir() and _is_visible(path)]
    return sorted(path.name for path in folders if path.name != "good")


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in _LITTER


def mask_of(picture: Path, folder: Path) -> Path:
    """Where the mask of a picture is: NAME_mask with any suffix; NAME_mask.png if there is none.

    Raises DataError for two of them.
    """
    return named(f"{picture.stem}_mask", folder) or folder / f"{picture.stem}_mask.png"


def named(stem: str, folder: Path) -> Path | None:
    """The picture of this name with any suffix, or None. Raises DataError for two of them."""
    found = [path for path in pictures_in(folder) if path.stem == stem]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise DataError(f"{folder} has {names}: keep one of them")
    return found[0] if found else None


def _remedy(path: Path, picture: Path) -> str:
    """What to do about a missing mask; a file with a similar name may be the mask."""
    stem = re.escape(picture.stem.lower())
    # for 00: 00.png, 00-mask.webp and mask_00.png, not 001.png
    pattern = re.compile(rf"([a-z]+[^a-z0-9]+)?{stem}(mask|[^a-z0-9].*)?")
    files = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    for near in filter(_is_visible, files):
        if pattern.fullmatch(near.stem.lower()):
            return f"save {near} as {path} if it is the mask, or remove the picture"
    return f"add {path} or remove the picture"


def sheet_backgrounds(
    data: str | Path, examples: list[Example], options: TrainingOptions
) -> list[Background]:
    """What sample sheets are drawn on: good parts that have an object mask, else the examples.

    Empty without background. Raises DataError as `find_examples` does.
    """
    if not options.background or not options.sample_every:
        return []
    if options.window is not None:
        # good parts have no defect to cut a window around
        return [Background(example.surroundings()) for example in examples]
    root = Path(data)
    good = [
        (picture, mask)
        for picture in pictures_in(root / "train" / "good")
        if (mask := mask_of(picture, root / "object_mask" / "good")).is_file()
    ][: options.samples]
    _refuse(root, [fault for picture, mask in good for fault in _faults(picture, None, mask)])
    if good:
        return [Background(picture, mask) for picture, mask in good]
    return [Background(example.picture, example.object_mask) for example in examples]


def listing(data: str | Path, examples: list[Example]) -> list[dict[str, str]]:
    """Every file read, relative to the data folder, with its sha256."""
    root = Path(data)
    return [
        {
            "file": path.relative_to(root).as_posix(),
            "sha256": sha256_of(path),
        }
        for example in examples
        for path in example.files
    ]


def _no_defect(root: Path, defect: str) -> str:
    known = defects_in(root)
    if known:
        return f"{root}/test has no folder {defect!r}: choose one of {', '.join(known[:20])}"
    return f"{root} is not in MVTec layout: expected {root}/test/{defect}/*.png"


def _resized(picture: Image.Image, size: int) -> np.ndarray:
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def _white(path: Path) -> np.ndarray:
    return np.array(open_picture(path, "mask", "L")) > 127


def _faults(picture: Path, mask: Path | None, object_mask: Path | None) -> list[str]:
    try:
        size = open_picture(picture, "picture", "RGB").size
    except SettingsError as error:
        return [str(error)]
    faults = []
    for path, kind in ((mask, "mask"), (object_mask, "object mask")):
        if path is None:
            continue
        if path.is_file():
            faults += _mask_faults(path, kind, size)
        else:
            faults.append(f"{picture} has no {kind}: {_remedy(path, picture)}")
    return faults


def _mask_faults(path: Path, kind: str, size: tuple[int, int]) -> list[str]:
    try:
        mask = open_picture(path, kind, "L")
    except SettingsError as error:
        return [str(error)]
    if mask.size != size:
        return [f"{path}: the {kind} has size {mask.size}, its picture {size}: make them equal"]
    if kind == "object mask":
        fault = object_mask_fault(mask)
        return [f"{path}: the {kind} {fault}"] if fault else []
    if mask.getextrema() == (0, 0):
        return [f"{path}: the {kind} has no white pixel: draw it or remove the picture"]
    return []
