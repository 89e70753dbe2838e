"""How fast the gallery of many pairs is written, and opened in a headless Chromium.

Run ``python -m dualdiff_engine.bench.gallery_page [--rows N] [--rounds N] [--output-json FILE]``.
It needs playwright and a Chromium on the path. Opened: from the request until the first cells and
their pictures are there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dualdiff_engine.bench import machine
from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.gallery import write_gallery

SIZE, PICTURES = 256, 100


def entries(root: Path, rows: int) -> Iterator[Entry]:
    """Rows over some pictures of noise."""
    rng = np.random.default_rng(0)
    for n in range(PICTURES):
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(root / f"{n}.png")
        Image.fromarray(rng.integers(0, 2, (SIZE, SIZE), np.uint8) * 255).save(root / f"{n}m.png")
    for n in range(rows):
        image, mask = root / f"{n % PICTURES}.png", root / f"{n % PICTURES}m.png"
        verdict = "accepted" if n % 10 else "area"
        yield Entry("product", f"defect{n % 6}", n, image, mask, None, {"x": n / rows}, verdict)


def run(rows: int, rounds: int) -> dict[str, Any]:
    from playwright.sync_api import sync_playwright

    opened, nodes, faults = [], [], []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        root = Path(folder)
        some = list(entries(root, rows))
        begin = time.perf_counter()
        write_gallery(some, root / "gallery")
        written = time.perf_counter() - begin
        path = shutil.which("chromium") or shutil.which("chromium-browser")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for _ in range(rounds):
            page = browser.new_page(viewport={"width": 1920, "height": 1080})
            page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            begin = time.perf_counter()
            page.goto((root / "gallery" / "index.html").as_uri())
            page.wait_for_selector("#grid .cell")
            page.wait_for_function("[...document.images].every((i) => i.complete)")
            opened.append(time.perf_counter() - begin)
            nodes.append(int(page.evaluate("document.querySelectorAll('*').length")))
            page.close()
        version = browser.version
        browser.close()
    return {
        **machine.facts(torch.device("cpu")),
        "chromium": version,
        "rows": rows,
        "rounds": rounds,
        "written_s": written,
        "opened_s": {"median": statistics.median(opened), "most": max(opened)},
        "nodes": max(nodes),
        "console_errors": len(faults),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-json", type=Path, metavar="FILE", help="keep the record")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.rows < 1:
        parser.error("--rows and --rounds have to be 1 or more")
    text = json.dumps(run(options.rows, options.rounds), indent=2) + "\n"
    if options.output_json:
        options.output_json.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
