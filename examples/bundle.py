"""Export base and adapters into one folder, verify it, and draw with it by ONNX Runtime.

Needs `pip install 'dualdiff-engine[onnx]'` and about a minute to trace the graphs.
"""

from pathlib import Path
from typing import Any

from dualdiff_engine import Engine
from dualdiff_engine.demo.presets import BASE, PRESETS
from dualdiff_engine.export.folder.bundle import write_bundle
from dualdiff_engine.export.folder.verify import verify_bundle


def main(out: Path, **options: Any) -> None:
    names = ("fabric/hole", "fabric/stain")
    folder = out / "bundle"
    if not folder.exists():
        write_bundle(BASE, [PRESETS[name].adapter for name in names], folder, say=print)
    for graph, row in verify_bundle(folder)["parity"].items():
        print(f"{graph}: error {row['error']:.1e}, at most {row['tolerance']:.1e}")
    # the base model is not needed any more
    with Engine.from_bundle(folder) as engine:
        for name in engine.adapters:
            engine.set_adapter(name)
            (pair,) = engine.generate(seeds=[7], **{**PRESETS["fabric/hole"].options(), **options})
            pair.image.save(out / f"{name}.png")


if __name__ == "__main__":
    main(Path("example-bundle"))
