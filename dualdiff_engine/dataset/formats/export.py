"""Checked pairs -> a folder in a format, whole or not at all."""

from __future__ import annotations

import errno
import importlib
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.formats.names import GOOD, slug, slugs
from dualdiff_engine.dataset.formats.tree import Good, Tree, flags_of, held_out
from dualdiff_engine.errors import DataError, OutputError, SettingsError
from dualdiff_engine.files import partial_name, sync
from dualdiff_engine.pictures import is_whole_png, open_picture


@dataclass(frozen=True)
class Format:
    """module: holds `write(tree, root, **arguments)`. needs: packages of the extra `formats`."""

    module: str
    needs: tuple[str, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)


FORMATS: Mapping[str, Format] = {
    "mvtec": Format("mvtec"),
    "mvtec-ad2": Format("mvtec_ad2"),
    "loco": Format("loco"),
    "papers": Format("papers"),
    "papers-anomalydiffusion": Format("papers", arguments={"style": "anomalydiffusion"}),
    "papers-seas": Format("papers", arguments={"style": "seas"}),
    "imagefolder": Format("imagefolder"),
    "webdataset": Format("shards", needs=("webdataset",)),
    "coco": Format("coco", needs=("pycocotools",)),
    "yolo": Format("yolo", needs=("supervision",)),
    "semantic": Format("semantic"),
}


@dataclass(frozen=True)
class Exported:
    """How many pairs and normal pictures were written; left_out: pairs that were not accepted."""

    pairs: int
    good: int
    left_out: int


def export(
    entries: Iterable[Entry],
    form: str,
    out: str | Path,
    *,
    good: Mapping[str, Sequence[Path]] | None = None,
    held: float = 0.2,
) -> Exported:
    """Write the accepted pairs of a dataset in a format.

    Everything is checked first; the folder gets its name when it is whole.

    Args:
        entries: the pairs. Those that are not accepted are left out.
        form: one of `FORMATS`.
        out: the folder: not there yet, or empty.
        good: normal pictures by product.
        held: share of the normal pictures for tests, and of the pairs for validation in formats
            whose readers train on pairs. 0 … 1, less than 1.

    Raises:
        SettingsError: an argument or a name is not usable, or a package is missing.
        DataError: there is no accepted pair, or a picture or mask cannot be used.
        OutputError: the folder holds something or cannot be written.
    """
    out = Path(out)
    kind = check_format(form)
    if not 0 <= held < 1:
        raise SettingsError(f"held_out must be at least 0 and less than 1, got {held:g}")
    _refuse_taken(out)
    rows = list(entries)
    tree = _tree(rows, good or {}, held)
    _warn_of_parents(out)
    write = importlib.import_module(f"dualdiff_engine.dataset.formats.{kind.module}").write
    with _whole_folder(out) as partial:
        write(tree, partial, **kind.arguments)
    pairs = sum(map(len, tree.pairs.values()))
    pictures = sum(len(some.train) + len(some.test) for some in tree.good.values())
    return Exported(pairs, pictures, len(rows) - pairs)


def check_format(form: str) -> Format:
    """Raises SettingsError for a format that there is not, or whose package is missing."""
    if form not in FORMATS:
        raise SettingsError(f"there is no format {form!r}: choose one of {', '.join(FORMATS)}")
    for package in FORMATS[form].needs:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise SettingsError(
                f"the format {form} needs {package} ({error}): "
                "pip install 'dualdiff-engine[formats]'"
            ) from error
    return FORMATS[form]


def _refuse_taken(out: Path) -> None:
    if not str(out) or out == Path():
        raise SettingsError("the output folder has no name: pass a path")
    try:
        taken = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
    except OSError as error:
        raise OutputError(f"{out} cannot be read ({error.strerror}): choose another") from error
    if taken:
        raise OutputError(f"{out} is there and not empty: remove it or choose another folder")


def _warn_of_parents(out: Path) -> None:
    if not str(out.resolve()).isascii():
        warnings.warn(
            f"{out.resolve()} is not plain ASCII: anomalib refuses datasets in such folders",
            stacklevel=3,
        )


def _tree(rows: Sequence[Entry], good: Mapping[str, Sequence[Path]], held: float) -> Tree:
    """The accepted pairs and the normal pictures, checked and named."""
    accepted = sorted(
        (row for row in rows if row.verdict == "accepted"),
        key=lambda row: (row.product, row.defect, row.number),
    )
    if not accepted:
        raise DataError(f"none of {len(rows)} pairs is accepted: there is nothing to export")
    products = slugs((row.product for row in accepted), "product")
    if strangers := sorted(set(good) - set(products)):
        raise SettingsError(
            f"there are normal pictures of {strangers[0]!r} and no pairs: "
            f"the products are {', '.join(products)}"
        )
    pairs: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    defects = {
        product: slugs((row.defect for row in accepted if row.product == product), "defect")
        for product in products
    }
    for row in accepted:
        name = defects[row.product][row.defect]
        if name.lower() == GOOD:
            raise SettingsError(f"a defect cannot be called {row.defect!r}: rename its folder")
        _check(row)
        pairs[products[row.product], name].append(row)
    _refuse_twice(pairs)
    split = {products[name]: _split(name, good.get(name, ()), held) for name in products}
    return Tree(dict(pairs), split, held)


def _refuse_twice(pairs: Mapping[tuple[str, str], Sequence[Entry]]) -> None:
    for (product, defect), entries in pairs.items():
        numbers = [entry.number for entry in entries]
        for first, second in pairwise(numbers):
            if first == second:
                raise DataError(f"{product}/{defect} has pair {first} twice: remove one")
        if numbers[-1] > 999_999:
            raise DataError(f"{product}/{defect} has pair {numbers[-1]}: six digits are the most")


def _check(entry: Entry) -> None:
    if not is_whole_png(entry.image):
        raise DataError(f"{entry.image} is missing or damaged: draw the pair again")
    try:
        flags = flags_of(entry.mask)
        width, height = open_picture(entry.image, "image").size
    except SettingsError as error:
        raise DataError(str(error)) from error
    if flags.shape != (height, width):
        size = flags.shape[1], flags.shape[0]
        raise DataError(f"{entry.mask} has size {size}, its image {(width, height)}")
    if not flags.any():
        raise DataError(f"{entry.mask} is empty: a defect needs a mask, draw the pair again")


def _split(product: str, pictures: Sequence[Path], held: float) -> Good:
    if not pictures:
        warnings.warn(
            f"no normal pictures of {slug(product)}: detectors that learn from them need "
            f"--good {product}=FOLDER",
            stacklevel=4,
        )
    for picture in pictures:
        try:
            open_picture(picture, "picture")
        except SettingsError as error:
            raise DataError(str(error)) from error
    test = held_out(pictures, held)
    return Good(
        [path for path in pictures if path not in test], [path for path in pictures if path in test]
    )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its name if the block succeeds, and is removed if not."""
    partial = partial_name(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_symlink():
            partial.unlink()
        # of an export that was killed
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        # an empty folder in its place is replaced; one that has been filled meanwhile is not
        partial.replace(out)
        sync(out.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(_unwritable(out, error)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(out: Path, error: Any) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space and run again" if full else "choose another folder"
    return f"{out} cannot be written ({error.strerror or error}): {remedy}"
