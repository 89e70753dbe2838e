"""Find and check training pictures in a folder in MVTec layout. All faults are listed at once.

    DATA/test/DEFECT/NAME.png                   the picture
    DATA/ground_truth/DEFECT/NAME_mask.png      the defect in white (values above 127)
    DATA/object_mask/DEFECT/NAME_mask.png       the object in white, to train with background
    DATA/train/good/NAME.png                    for sample sheets with background, together with
    DATA/object_mask/good/NAME_mask.png         their objects in white

MVTec AD has no object masks: the third and fifth are this project's extension of its layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.files import sha256_of
from dualdiff_engine.pictures import open_picture
from dualdiff_engine.pipeline.background import cut_out
from dualdiff_engine.settings import Background
from dualdiff_engine.training.options import TrainingOptions

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
# with one picture, an adapter cannot learn what is defect and what is surroundings
FEWEST = 2
_MOST_TOLD = 50


@dataclass(frozen=True)
class Example:
    """A picture of the defect, its mask, and with background the mask of the object."""

    picture: Path
    mask: Path
    object_mask: Path | None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.picture, self.mask, self.object_mask) if path is not None]

    def image(self, size: int) -> np.ndarray:
        """uint8 [size, size, 3]."""
        return _resized(open_picture(self.picture, "picture", "RGB"), size)

    def anomaly(self, size: int) -> np.ndarray:
        """The defect alone on black, uint8 [size, size, 3]; cut before resizing."""
        picture = np.array(open_picture(self.picture, "picture", "RGB"))
        picture[~_white(self.mask)] = 0
        return _resized(Image.fromarray(picture), size)

    def surroundings(self, size: int) -> np.ndarray:
        """The picture with the object black, as the engine cuts it, uint8 [size, size, 3]."""
        return cut_out(Background(self.picture, self.object_mask), size, size)


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
        name = f"{picture.stem}_mask.png"
        example = Example(
            picture,
            root / "ground_truth" / defect / name,
            root / "object_mask" / defect / name if options.background else None,
        )
        faults += _faults(example)
        examples.append(example)
    _refuse(root, faults)
    return examples


def _refuse(root: Path, faults: list[str]) -> None:
    if faults:
        more = [f"… and {len(faults) - _MOST_TOLD} more"] if len(faults) > _MOST_TOLD else []
        raise DataError("\n".join([f"{root}: unusable data", *faults[:_MOST_TOLD], *more]))


def pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def sheet_backgrounds(
    data: str | Path, examples: list[Example], options: TrainingOptions
) -> list[Background]:
    """What sample sheets are drawn on: good parts that have an object mask, else the examples.

    Empty without background. Raises DataError as `find_examples` does.
    """
    if not options.background or not options.sample_every:
        return []
    root = Path(data)
    good = [
        Example(picture, mask, mask)
        for picture in pictures_in(root / "train" / "good")
        if (mask := root / "object_mask" / "good" / f"{picture.stem}_mask.png").is_file()
    ][: options.samples]
    _refuse(root, [fault for example in good for fault in _faults(example)[:1]])
    return [Background(e.picture, e.object_mask) for e in good or examples]


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
    known = sorted(p.name for p in (root / "test").glob("*") if p.is_dir() and p.name != "good")
    if known:
        return f"{root}/test has no folder {defect!r}: choose one of {', '.join(known[:20])}"
    return f"{root} is not in MVTec layout: expected {root}/test/{defect}/*.png"


def _resized(picture: Image.Image, size: int) -> np.ndarray:
    return np.array(picture.resize((size, size), Image.Resampling.BICUBIC))


def _white(path: Path) -> np.ndarray:
    return np.array(open_picture(path, "mask", "L")) > 127


def _faults(example: Example) -> list[str]:
    try:
        picture = _decoded(example.picture, "picture", "RGB")
    except DataError as error:
        return [str(error)]
    faults = []
    masks = [(example.mask, "mask")]
    if example.object_mask is not None:
        masks.append((example.object_mask, "object mask"))
    for path, kind in masks:
        if not path.is_file():
            faults.append(f"{example.picture} has no {kind}: add {path} or remove the picture")
            continue
        try:
            faults += _mask_faults(path, kind, picture.size)
        except DataError as error:
            faults.append(str(error))
    return faults


def _mask_faults(path: Path, kind: str, size: tuple[int, int]) -> list[str]:
    mask = _decoded(path, kind, "L")
    if mask.size != size:
        return [f"{path}: the {kind} has size {mask.size}, its picture {size}: make them equal"]
    levels = np.array(mask)
    if not (levels > 127).any():
        hint = f" (brightest value {levels.max()}: save white as 255)" if levels.any() else ""
        return [f"{path}: the {kind} has no white pixel{hint}: draw it or remove the picture"]
    if kind == "object mask" and (levels > 127).all():
        return [f"{path}: the {kind} is all white, so no background is left: correct it"]
    return []


def _decoded(path: Path, kind: str, mode: str) -> Image.Image:
    try:
        return open_picture(path, kind, mode)
    except SettingsError as error:
        raise DataError(f"{error}: save it again") from error
    # Pillow reports damaged chunks of a PNG this way
    except (SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{path}: the {kind} is damaged ({error}): save it again") from error
