"""A contact sheet of a run: picture, anomaly picture, mask, a column per pair.

`python -m dualdiff_engine.bench.sheet RUN_FOLDER SHEET.png`
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

GAP = 4


def sheet(run: Path, most: int = 8) -> Image.Image:
    """The first pairs of a folder written by `dualdiff generate`."""
    names = sorted(path.name for path in (run / "image").glob("*.png"))[:most]
    rows = [[Image.open(run / kind / n) for n in names] for kind in ("image", "anomaly", "mask")]
    width, height = rows[0][0].size
    size = len(names) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP
    whole = Image.new("RGB", size, "white")
    for row, pictures in enumerate(rows):
        for column, picture in enumerate(pictures):
            whole.paste(picture.convert("RGB"), (column * (width + GAP), row * (height + GAP)))
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    sheet(options.run).save(options.target, optimize=True)


if __name__ == "__main__":
    main()
