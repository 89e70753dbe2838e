"""`dualdiff gallery`: a page to look through pairs and to reject some."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualdiff_engine.cli.export_dataset import Defect, Pairs, Product, entries_of
from dualdiff_engine.cli.options import Quiet


def gallery(
    pairs: Pairs,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write. [default: DIR/gallery]")
    ] = None,
    product: Product = None,
    defect: Defect = None,
    quiet: Quiet = False,
) -> None:
    """Write a page to look through pairs and to reject some; open it in a browser."""
    from dualdiff_engine.dataset.gallery import write_gallery

    folder = out or pairs / "gallery"
    count = write_gallery(entries_of(pairs, product, defect), folder)
    if not quiet:
        typer.echo(f"{folder / 'index.html'}: {count} pairs")
