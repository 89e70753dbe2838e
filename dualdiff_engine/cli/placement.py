"""`--picture`, `--region` and their kin: files and folders on the command line -> placements."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Placement

if TYPE_CHECKING:
    from dualdiff_engine.pipeline.regions import RegionStatistics

Pictures = Annotated[
    str | None,
    typer.Option(
        "--picture",
        help="Normal picture to draw the defect on, a folder of them, or a pattern such as "
        "'good/*.png'; pair after pair takes the next one.",
    ),
]
Region = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        help="Where the defect goes, in white: a mask for all pictures, or a folder with a mask of "
        "the same name (or NAME_mask) for each. Default: sampled on the object.",
    ),
]
RegionMasks = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder with masks of real defects: sampled regions have their sizes and shapes.",
    ),
]
Edge = Annotated[
    float | None,
    typer.Option(help="Soft edge around the region, in latent pixels of 8 pixels (default: 2)."),
]
Paste = Annotated[
    Literal["none", "region", "mask", "difference"] | None,
    typer.Option(
        help="Where the drawn pixels are kept; all others are the normal picture's own (default: "
        "region). difference: add to the normal picture's pixels what was drawn into the region."
    ),
]
WindowRatio = Annotated[
    str | None,
    typer.Option(
        "--window",
        help="Draw only a window around the region, into pictures of the pictures' own size: auto, "
        "or the window's side over the region's, for example 2.5. Default: the whole picture, "
        "resized.",
    ),
]

MaskFrom = Annotated[
    Literal["anomaly", "change", "both"],
    typer.Option(
        "--mask",
        help="What masks are made from: the anomaly image; with --picture also the visible change, "
        "or the anomaly image where there is change (both).",
    ),
]
Accept = Annotated[
    str | None,
    typer.Option(
        help="Draw pairs again whose scores miss a bound: 'default', or for example "
        "min_area=0.001,max_change_outside=0.02."
    ),
]
Attempts = Annotated[
    int | None, typer.Option(help="With --accept: how often a pair is drawn at most (default: 4).")
]


@dataclass(frozen=True)
class PlacementOptions:
    """What the command line says of placements; see `Placement`.

    object_mask: a file, a folder, "all" or None.
    """

    pictures: str | None
    region: Path | None
    region_masks: Path | None
    object_mask: str | None
    edge: float | None
    paste: str | None
    window: str | None

    def placements(self, statistics: Callable[[], RegionStatistics] | None) -> list[Placement]:
        """One per picture; none without pictures.

        statistics: of the defect, where they are known without `region_masks`. Raises
        SettingsError, DataError.
        """
        if self.pictures is None:
            self._refuse_without_pictures()
            return []
        found = pictures_of(self.pictures)
        sampled = None if self.region is not None else self._statistics(statistics)
        window = None if self.window is None else _window_of(self.window)
        chosen: dict[str, Any] = {"edge": self.edge, "paste": self.paste, "window": window}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return [
            Placement(
                picture,
                sampled or _mask_of(picture, self.region, "region"),
                None if self.object_mask is None else _object_mask_of(picture, self.object_mask),
                **chosen,
            )
            for picture in found
        ]

    def _refuse_without_pictures(self) -> None:
        given: dict[str, Any] = {
            "--region": self.region,
            "--region-masks": self.region_masks,
            "--edge": self.edge,
            "--paste": self.paste,
            "--window": self.window,
        }
        for name, value in given.items():
            if value is not None:
                raise SettingsError(f"{name} needs --picture: pass the normal pictures")

    def _statistics(self, known: Callable[[], RegionStatistics] | None) -> RegionStatistics:
        if self.region_masks is not None:
            from dualdiff_engine.pipeline.regions import region_statistics
            from dualdiff_engine.training.data import pictures_in

            masks = pictures_in(self.region_masks)
            if not masks:
                raise SettingsError(f"--region-masks: {self.region_masks} holds no pictures")
            return region_statistics(masks)
        if known is None:
            raise SettingsError(
                "where does the defect go? Pass --region, or --region-masks FOLDER with masks of "
                "real defects, and regions like them are sampled on the object"
            )
        return known()


def _window_of(text: str) -> str | float:
    """A `Placement.window`. Raises SettingsError for what is neither auto nor a number."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise SettingsError(
            f"--window must be auto or a number such as 2.5, got {text!r}"
        ) from error


def repeated(placements: Sequence[Placement], chosen: Mapping[str, Any]) -> list[Placement] | None:
    """One per pair, from the first again after the last; chosen: what selects the pairs."""
    pairs = len(chosen["seeds"]) if "seeds" in chosen else chosen["n"]
    return [placements[n % len(placements)] for n in range(pairs)] if placements else None


def bounds_of(text: str | None) -> str | dict[str, float] | None:
    """The bounds of `--accept`, for `Engine.stream`. Raises SettingsError."""
    if text is None or text == "default":
        return text
    bounds = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            bounds[name.strip()] = float(value)
        except ValueError as error:
            raise SettingsError(
                f"--accept: {part!r} is not a bound: write 'default' or min_area=0.001,…"
            ) from error
    return bounds


def pictures_of(text: str) -> list[Path]:
    """The pictures of a file name, a folder or a pattern, by name. Raises SettingsError."""
    from dualdiff_engine.training.data import SUFFIXES, pictures_in

    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        found: Sequence[Path] = pictures_in(path)
    else:
        matches = sorted(Path(name) for name in glob.glob(text))  # noqa: PTH207
        found = [match for match in matches if match.suffix.lower() in SUFFIXES]
    if not found:
        raise SettingsError(f"--picture: no pictures at {text!r}: pass a file, folder or pattern")
    return list(found)


def _object_mask_of(picture: Path, given: str) -> Path | str:
    if given == "all":
        return given
    if not Path(given).exists():
        raise SettingsError(f"--object-mask: no file or folder {given!r}; 'all' for a texture")
    return _mask_of(picture, Path(given), "object-mask")


def _mask_of(picture: Path, given: Path | None, option: str) -> Path:
    """A mask for all, or the one of a picture's name in a folder. Raises SettingsError."""
    from dualdiff_engine.training.data import named

    assert given is not None
    if not given.is_dir():
        return given
    found = named(picture.stem, given) or named(f"{picture.stem}_mask", given)
    if found is None:
        raise SettingsError(
            f"--{option}: {given} has no mask of {picture.name}: add {picture.stem}_mask.png"
        )
    return found
