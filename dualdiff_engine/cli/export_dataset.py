"""`dualdiff export-dataset`: pairs in the formats that training programs read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualdiff_engine.cli.options import Quiet
from dualdiff_engine.errors import DataError, SettingsError

if TYPE_CHECKING:
    from dualdiff_engine.dataset.entries import Entry

# of `FORMATS`, which is slow to import; a test compares the two
FORMS = (
    "mvtec, mvtec-ad2, loco, papers, papers-anomalydiffusion, papers-seas, imagefolder, "
    "webdataset, coco, yolo, semantic"
)
_folder = {"exists": True, "file_okay": False, "readable": True}
Pairs = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        **_folder,
        help="A dataset by `dualdiff make`, a folder by `dualdiff generate`, or one of "
        "PRODUCT/DEFECT/ folders by it.",
    ),
]
Product = Annotated[str | None, typer.Option(help="Of a single folder: the product's name.")]
Defect = Annotated[
    str | None, typer.Option(help="Of a single folder: the defect's name. [default: the folder's]")
]


def export_dataset(
    pairs: Pairs,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help=f"One of {FORMS}; see docs/dataset_formats.md.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to write: new or empty.")],
    good: Annotated[
        list[str] | None,
        typer.Option(metavar="PRODUCT=FOLDER", help="Normal pictures of a product; repeat it."),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            help="Share for tests of the normal pictures, and to validate of the pairs in formats "
            "whose readers train on them."
        ),
    ] = 0.2,
    product: Product = None,
    defect: Defect = None,
    quiet: Quiet = False,
) -> None:
    """Write accepted pairs and normal pictures in a format that training programs read."""
    from dualdiff_engine.dataset.formats import export

    with told(quiet):
        normal = _good(good or ())
        done = export(entries_of(pairs, product, defect), form, out, good=normal, held=held_out)
    if not quiet:
        left = f", {done.left_out} pairs left out (not accepted)" if done.left_out else ""
        typer.echo(f"{out}: {done.pairs} pairs, {done.good} normal pictures{left}")


def entries_of(root: Path, product: str | None, defect: str | None) -> Iterator[Entry]:
    """The pairs in a folder, by what it is: a dataset by `dualdiff make`, or runs of `generate`."""
    from dualdiff_engine.dataset import layout
    from dualdiff_engine.dataset.entries import entries
    from dualdiff_engine.dataset.folder_entries import folder_entries

    if (root / layout.RUN).is_file():
        if product is not None or defect is not None:
            raise SettingsError(
                f"{root} is a dataset, which names products and defects itself: leave out "
                "--product and --defect"
            )
        return entries(root)
    return folder_entries(root, product, defect)


def _good(texts: Sequence[str]) -> dict[str, list[Path]]:
    """Product -> normal pictures, sorted by name."""
    from dualdiff_engine.training.data import pictures_in

    found: dict[str, list[Path]] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise SettingsError(f"--good takes PRODUCT=FOLDER, got {text!r}")
        if name in found:
            raise SettingsError(f"--good is given twice for {name}: put the pictures in one folder")
        if not Path(folder).is_dir():
            raise SettingsError(f"--good {name}: {folder} is not a folder")
        found[name] = sorted(pictures_in(Path(folder)))
        if not found[name]:
            raise DataError(f"--good {name}: {folder} holds no pictures")
    return found


@contextmanager
def told(quiet: bool) -> Iterator[None]:
    """Warnings as lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught if not quiet else ():
        typer.echo(f"dualdiff: warning: {warning.message}", err=True)
