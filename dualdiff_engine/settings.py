"""What a caller may choose: frozen, validated on construction, recorded with every pair."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
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
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise SettingsError(
                    f"prompt {name!r} is not valid UTF-8 text: check the terminal's encoding"
                ) from error

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


# what the released programs sample with: without a background, and with one
# a guided step adds this many differences of two predictions; no one uses a tenth of it
MOST_GUIDANCE = 1000
PLAIN_STEPS, PLAIN_GUIDANCE = 100, 2.5
BACKGROUND_STEPS, BACKGROUND_GUIDANCE = 50, 2.0


@dataclass(frozen=True)
class Sampling:
    """How noise becomes clean latents. What is None takes its default when a run starts.

    Args:
        steps: Scheduler steps, 1 to 1000. Default: 100, with a background 50, as released.
        guidance: Classifier-free guidance scale of both branches. At 1 or below, the unconditional
            rows are not computed. Default: 2.5, with a background 2.0, as released.
        scheduler: Class name of a diffusers scheduler. Default: the base model's own.
        height: Pixels, a multiple of 8 from 8 to 8192. Default: the base model's own size.
        width: As height.

    Raises:
        SettingsError: A value is out of range.
    """

    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        _require(
            self.steps is None or (isinstance(self.steps, int) and 1 <= self.steps <= 1000),
            f"steps must be a whole number from 1 to 1000, got {self.steps!r}",
        )
        _require(
            self.guidance is None
            or (isinstance(self.guidance, int | float) and abs(self.guidance) <= MOST_GUIDANCE),
            f"guidance must be a finite number up to {MOST_GUIDANCE}, got {self.guidance!r}",
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            _require(
                value is None or (isinstance(value, int) and 8 <= value <= 8192 and value % 8 == 0),
                f"{name} must be a multiple of 8 from 8 to 8192, got {value!r}",
            )

    def filled(self, *, background: bool, scheduler: str, size: int) -> ChosenSampling:
        """The same with every default in place.

        Args:
            background: Whether the run has a background.
            scheduler: The base model's own scheduler.
            size: The base model's own size in pixels, of height and of width.
        """
        steps, guidance = (
            (BACKGROUND_STEPS, BACKGROUND_GUIDANCE) if background else (PLAIN_STEPS, PLAIN_GUIDANCE)
        )
        return ChosenSampling(
            steps=steps if self.steps is None else self.steps,
            guidance=guidance if self.guidance is None else self.guidance,
            scheduler=self.scheduler or scheduler,
            height=self.height or size,
            width=self.width or size,
        )


@dataclass(frozen=True)
class ChosenSampling:
    """A `Sampling` without open choices, as a run uses and records it."""

    steps: int
    guidance: float
    scheduler: str
    height: int
    width: int

    @property
    def guided(self) -> bool:
        """Whether unconditional rows are computed."""
        return self.guidance > 1.0

    @property
    def rows(self) -> int:
        """Guidance rows per pair: 2 (uncond, cond) or 1."""
        return 2 if self.guided else 1


def sampling_of(
    sampling: Sampling | None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    size: int | Sequence[int] | None = None,
) -> Sampling:
    """One `Sampling` of an object or of single values. Raises SettingsError when both are given."""
    height, width = size_of(size)
    single = Sampling(steps, guidance, scheduler, height, width)
    if sampling is None:
        return single
    _require(isinstance(sampling, Sampling), f"sampling must be Sampling(...), got {sampling!r}")
    _require(
        single == Sampling(),
        "give sampling=Sampling(...) or steps, guidance, scheduler and size, not both",
    )
    return sampling


@dataclass(frozen=True)
class Background:
    """The surroundings to keep, for adapters trained with background compensation.

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


def size_of(size: int | Sequence[int] | None) -> tuple[int | None, int | None]:
    """(height, width) in pixels of one number or two; (None, None) of None."""
    if size is None:
        return None, None
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        return size[0], size[1]
    raise SettingsError(f"size must be one number or (height, width), got {size!r}")


_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def size_from_text(text: str, option: str = "--size") -> tuple[int, int]:
    """(height, width) in pixels of "512" or "512x768". Raises SettingsError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SettingsError(f"{option} must be 512 or 512x768 (HEIGHTxWIDTH), got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def seeds_of(
    n: int | Sequence[int] | None, seeds: Sequence[int] | None, given: int | None
) -> tuple[int, ...]:
    """One seed per pair; n: how many, or the seeds; given: how many pairs have latents given."""
    if seeds is None and isinstance(n, Sequence) and not isinstance(n, str):
        n, seeds = None, n
    if seeds is not None:
        chosen = tuple(require_seed(seed) for seed in seeds)
        if n is not None and n != len(chosen):
            raise SettingsError(f"n is {n} but there are {len(chosen)} seeds: give one of them")
    else:
        if n is None:
            n = given or 1
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise SettingsError(f"n must be a positive whole number, got {n!r}")
        chosen = tuple(secrets.randbits(32) for _ in range(n))
    if not chosen:
        raise SettingsError("seeds is empty: nothing to generate")
    if given is not None and given != len(chosen):
        raise SettingsError(f"latents hold {given} pairs, asked for {len(chosen)}")
    return chosen


def batch_of(batch: int | None, max_batch: int, pairs: int) -> int:
    if batch is None:
        return min(max_batch, pairs)
    if isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch <= max_batch:
        raise SettingsError(
            f"batch must be from 1 to {max_batch} (max_batch of the engine), got {batch!r}"
        )
    return batch


def max_batch_of(max_batch: int | None) -> int | None:
    wrong = isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1
    if max_batch is not None and wrong:
        raise SettingsError(f"max_batch must be a positive whole number, got {max_batch!r}")
    return max_batch
