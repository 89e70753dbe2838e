"""Look into a run after every step, change its latents, and stop it early."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dualdiff_engine import Engine
from dualdiff_engine.demo.presets import BASE, PRESETS


def watch(
    engine: Engine, step: int, timestep: Tensor, values: dict[str, Tensor]
) -> dict[str, Tensor]:
    """As in diffusers; latents are [B, 2, 4, h, w]: the image branch, then the anomaly branch."""
    image, anomaly = values["latents"].unbind(1)
    print(f"step {step}: deviation {image.std():.2f} (image), {anomaly.std():.2f} (anomaly)")
    # what is returned is used from here on
    return {"latents": values["latents"].clamp(-6, 6)}


def main(out: Path, **options: Any) -> None:
    out.mkdir(parents=True, exist_ok=True)
    preset = PRESETS["tile/stain"]
    options = {**preset.options(), "callback_on_step_end": watch, **options}
    with Engine.from_pretrained(BASE, adapter=preset.adapter) as engine:
        for pair in engine.stream(seeds=range(3), batch=1, **options):
            pair.image.save(out / f"{pair.seed}.png")
            # from another thread or a signal handler, too: the run ends, finished pairs stay
            engine.interrupt()


if __name__ == "__main__":
    main(Path("example-callback"))
