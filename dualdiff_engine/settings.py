"""What a caller may choose: frozen, validated on construction, recorded with every pair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dualdiff_engine.errors import SettingsError

BRANCHES = ("image", "anomaly")

# the prompts the released programs train and sample with
IMAGE_PROMPT = "a vfx with sks"
ANOMALY_PROMPT = "sks"

NoiseMode = Literal["fresh", "fixed"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


@dataclass(frozen=True)
class Prompts:
    """The prompt of each branch and the negative prompt they share."""

    image: str = IMAGE_PROMPT
    anomaly: str = ANOMALY_PROMPT
    negative: str = ""

    def __post_init__(self) -> None:
        for name in ("image", "anomaly", "negative"):
            value = getattr(self, name)
            _require(isinstance(value, str), f"prompt {name!r} must be text, got {value!r}")

    @classmethod
    def of(cls, value: Prompts | tuple[str, str] | None) -> Prompts:
        """Accept `Prompts`, an (image, anomaly) pair, or None for the released defaults."""
        if value is None:
            return cls()
        if isinstance(value, Prompts):
            return value
        if isinstance(value, tuple | list) and len(value) == 2:
            return cls(*value)
        raise SettingsError(
            f"prompts must be Prompts(...) or (image prompt, anomaly prompt), got {value!r}"
        )


@dataclass(frozen=True)
class Sampling:
    """How latents become clean.

    steps: scheduler steps. guidance: classifier-free guidance scale of both branches; at 1 or
    below the unconditional rows are not computed. scheduler: a diffusers scheduler class name,
    None for the base model's own. height, width: pixels, multiples of 8.
    """

    steps: int = 100
    guidance: float = 2.5
    scheduler: str | None = None
    height: int = 512
    width: int = 512

    def __post_init__(self) -> None:
        _require(
            isinstance(self.steps, int) and 1 <= self.steps <= 1000,
            f"steps must be a whole number from 1 to 1000, got {self.steps!r}",
        )
        _require(
            isinstance(self.guidance, int | float) and math.isfinite(self.guidance),
            f"guidance must be a finite number, got {self.guidance!r}",
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            _require(
                isinstance(value, int) and 8 <= value <= 8192 and value % 8 == 0,
                f"{name} must be a multiple of 8 from 8 to 8192, got {value!r}",
            )

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are computed."""
        return self.guidance > 1.0

    @property
    def rows(self) -> int:
        """Guidance rows per pair: 2 (uncond, cond) or 1."""
        return 2 if self.guided else 1


@dataclass(frozen=True)
class Background:
    """The surroundings to keep true, for adapters trained with background compensation.

    picture: file path, PIL image, or uint8 array [H, W, 3]. object_mask: the object in white
    (values above 127), the same kinds; its pixels are blacked out. Leave it None when the picture
    is already cut out. noise: `fresh` draws new background noise for every denoiser call, as
    released; `fixed` draws once per timestep, so that the background keys and values are computed
    once and reused by every later batch. noise_seed: seeds either kind, so that a pair stays a
    function of its recipe.
    """

    picture: Any
    object_mask: Any = None
    noise: NoiseMode = "fresh"
    noise_seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.noise in ("fresh", "fixed"),
            f"background noise must be 'fresh' or 'fixed', got {self.noise!r}",
        )
        require_seed(self.noise_seed, "noise_seed")
        for name in ("picture", "object_mask"):
            value = getattr(self, name)
            if isinstance(value, str | Path) and not Path(value).is_file():
                raise SettingsError(f"background {name}: no file {str(value)!r}")


def require_seed(seed: object, name: str = "seed") -> int:
    """Seeds are what `torch.Generator.manual_seed` takes without wrapping: 0 … 2^63-1."""
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise SettingsError(f"{name} must be a whole number, got {seed!r}")
    value = int(seed.__index__())
    _require(0 <= value < 2**63, f"{name} must be from 0 to 2^63-1, got {value}")
    return value
