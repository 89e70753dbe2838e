"""A contact sheet of a run: picture, anomaly picture, mask, a column per pair.

`python -m dualdiff_engine.bench.sheet RUN_FOLDER SHEET.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from dualdiff_engine.folder_writer import KINDS
from dualdiff_engine.pictures import grid


def sheet(run: Path, most: int = 8) -> Image.Image:
    """The first pairs of a folder written by `dualdiff generate`."""
    names = sorted(path.name for path in (run / "image").glob("*.png"))[:most]
    return grid([[Image.open(run / kind / name) for kind in KINDS] for name in names])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    sheet(options.run).save(options.target, optimize=True)


if __name__ == "__main__":
    main()
