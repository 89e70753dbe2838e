"""Draw defects on normal pictures, in regions like those of real defects, and a sheet of them."""

from pathlib import Path
from typing import Any

from PIL import Image

from dualdiff_engine import Engine, Placement, region_statistics
from dualdiff_engine.demo.factory import make
from dualdiff_engine.demo.presets import BASE, PRESETS
from dualdiff_engine.pictures import grid, overlay


def main(out: Path, name: str = "tile/stain", **options: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS[name]
    # masks of eight real defects: sampled regions have their sizes and shapes
    masks = [make(preset.part, preset.defect, seed=seed).mask for seed in range(8)]
    statistics = region_statistics(masks)
    # eight good parts with their objects in white; your own pictures may be paths, too
    parts = [make(preset.part, seed=100 + n) for n in range(8)]
    placements = [Placement(part.image, statistics, part.object_mask) for part in parts]
    options = {**preset.options(), **options}
    with Engine.from_pretrained(BASE, adapter=preset.adapter) as engine:
        pairs = engine.generate(seeds=range(8), placement=placements, **options)
    columns = []
    for part, pair in zip(parts, pairs, strict=True):
        pair.image.save(out / f"{pair.seed}.png")
        pair.mask.save(out / f"{pair.seed}_mask.png")
        normal = Image.fromarray(part.image).resize(pair.image.size)
        marked = overlay(pair.image, pair.mask)
        columns.append([normal, pair.region, pair.image, pair.anomaly, marked])
    grid(columns).save(out / "sheet.png")


if __name__ == "__main__":
    main(Path("example-placement"))
