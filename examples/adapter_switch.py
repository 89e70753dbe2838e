"""Keep two adapters resident and switch between them: one seed, two defects."""

from pathlib import Path
from typing import Any

from dualdiff_engine import Engine
from dualdiff_engine.demo.presets import BASE, PRESETS


def main(out: Path, **options: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with Engine.from_pretrained(BASE) as engine:
        for name in ("fabric/hole", "fabric/stain"):
            engine.load_adapter(PRESETS[name].adapter, name)
        for name in engine.adapters:
            # both were folded when they were loaded: this only points at other tensors
            engine.set_adapter(name)
            (pair,) = engine.generate(seeds=[7], **{**PRESETS[name].options(), **options})
            pair.image.save(out / f"{name.replace('/', '-')}.png")
            print(f"{name}: {pair.recipe['mask']['area']:.1%} of the image is defect")


if __name__ == "__main__":
    main(Path("example-adapters"))
