"""Draw pairs with the demo model and write them to a folder that can be resumed."""

from pathlib import Path
from typing import Any

from dualdiff_engine import Engine
from dualdiff_engine.demo.presets import BASE, PRESETS
from dualdiff_engine.folder_writer import FolderWriter


def main(out: Path, **options: Any) -> None:
    preset = PRESETS["fabric/hole"]
    # steps, guidance, scheduler and prompts that suit the demo model; your options win
    options = {**preset.options(), **options}
    with (
        FolderWriter(out) as writer,
        Engine.from_pretrained(BASE, adapter=preset.adapter) as engine,
    ):
        # the same seed draws the same pair, in any batch
        for pair in engine.stream(seeds=range(4), batch=4, **options):
            index = writer.write(pair)
            print(f"{out}/image/{index:05d}.png  seed {pair.seed}  empty mask: {pair.empty_mask}")


if __name__ == "__main__":
    main(Path("example-pairs"))
