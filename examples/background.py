"""Draw defects on a part's own surroundings, with an adapter trained with a background."""

from pathlib import Path
from typing import Any

from dualdiff_engine import Background, Engine
from dualdiff_engine.demo.factory import make
from dualdiff_engine.demo.presets import BASE, PRESETS


def main(out: Path, **options: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS["washer/stain"]
    # a good part, and its object in white; your own pictures may be paths, PIL images or arrays
    part = make("washer", seed=3)
    # fixed noise: the background's keys and values are computed once, for all batches
    background = Background(part.image, part.object_mask, noise="fixed")
    options = {**preset.options(), "background": background, **options}
    with Engine.from_pretrained(BASE, adapter=preset.adapter) as engine:
        for pair in engine.stream(seeds=range(3), batch=1, **options):
            pair.image.save(out / f"{pair.seed}.png")
            pair.mask.save(out / f"{pair.seed}_mask.png")


if __name__ == "__main__":
    main(Path("example-background"))
