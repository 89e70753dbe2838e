"""What ships with the package: a small base model and an adapter per part and defect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Background, Placement, Prompts

MODEL = Path(__file__).parent / "model"
BASE = MODEL / "base"
ADAPTERS = MODEL / "adapters"

# what the demo's pictures are drawn with: DPM-Solver++ needs few steps, and a base that knows
# three parts needs no guidance to name one
SAMPLING: Mapping[str, Any] = {
    "steps": 25,
    "guidance": 1.0,
    "scheduler": "DPMSolverMultistepScheduler",
}
# seed in the factory of the good part that lends its surroundings
BACKGROUND_SEED = 1


@dataclass(frozen=True)
class Preset:
    """An adapter of the demo, and the settings to draw with it.

    Attributes:
        part: washer, fabric or tile.
        defect: what the adapter draws.
        background: True if the adapter was trained with a background and needs one.
    """

    part: str
    defect: str
    background: bool

    @property
    def name(self) -> str:
        return f"{self.part}/{self.defect}"

    @property
    def adapter(self) -> Path:
        return ADAPTERS / f"{self.part}-{self.defect}"

    @property
    def prompts(self) -> Prompts:
        # for such words the base lays pieces on a part, and draws pieces on black
        return Prompts(f"a {self.part} with a piece of sks", "a piece of sks")

    def options(self, background_seed: int = BACKGROUND_SEED) -> dict[str, Any]:
        """Arguments of `Engine.stream`; background_seed: of the part that lends surroundings."""
        chosen: dict[str, Any] = {**SAMPLING, "prompts": self.prompts}
        if self.background:
            from dualdiff_engine.demo.factory.samples import make

            # fixed noise: keys and values of the surroundings are computed once for all batches
            part = make(self.part, seed=background_seed)
            chosen["background"] = Background(part.image, part.object_mask, "fixed")
        return chosen

    def placement(self, seed: int, region: Any, **how: Any) -> Placement:
        """On the good part that the factory makes of a seed; region and how: as in `Placement`."""
        from dualdiff_engine.demo.factory.samples import make

        part = make(self.part, seed=seed)
        # a texture has no surroundings
        object_mask = "all" if part.object_mask.all() else part.object_mask
        return Placement(part.image, region, object_mask, **how)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("washer", "chip", background=False),
        Preset("washer", "stain", background=True),
        Preset("fabric", "hole", background=False),
        Preset("fabric", "stain", background=False),
        Preset("tile", "stain", background=False),
        Preset("tile", "chip", background=True),
    )
}


def find(name: str) -> Preset:
    """The preset of a name such as "washer/stain". Raises SettingsError if there is none."""
    if name not in PRESETS:
        raise SettingsError(f"no demo {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
