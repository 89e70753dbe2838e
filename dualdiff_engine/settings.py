"""What a caller may choose: frozen, validated on construction, recorded with every pair."""

from __future__ import annotations

import math
import numbers
import operator
import re
import secrets
from collections.abc import Iterable, Sequence
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


def whole_number(value: object) -> int | None:
    """An integer of Python, NumPy or PyTorch as Python's; None for all else, bools among it."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).removeprefix("torch.") == "bool":
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _count(name: str, value: object, expected: str, least: int, most: int | None = None) -> int:
    """A whole number within bounds. Raises SettingsError."""
    number = whole_number(value)
    fits = number is not None and number >= least and (most is None or number <= most)
    if number is None or not fits:
        raise SettingsError(f"{name} must be {expected}, got {value!r}")
    return number


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
        # NumPy's numbers become Python's, which a recipe can hold
        if self.steps is not None:
            steps = _count("steps", self.steps, "a whole number from 1 to 1000", 1, 1000)
            object.__setattr__(self, "steps", steps)
        if self.guidance is not None:
            object.__setattr__(self, "guidance", _guidance(self.guidance))
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None:
                side = _count(name, value, "a multiple of 8 from 8 to 8192", 8, 8192)
                _require(
                    side % 8 == 0, f"{name} must be a multiple of 8 from 8 to 8192, got {value!r}"
                )
                object.__setattr__(self, name, side)

    def filled(self, *, background: bool, scheduler: str, size: tuple[int, int]) -> ChosenSampling:
        """The same with every default in place.

        Args:
            background: Whether the run has a background.
            scheduler: The base model's own scheduler.
            size: The base model's own (height, width) in pixels.
        """
        steps, guidance = (
            (BACKGROUND_STEPS, BACKGROUND_GUIDANCE) if background else (PLAIN_STEPS, PLAIN_GUIDANCE)
        )
        return ChosenSampling(
            steps=steps if self.steps is None else self.steps,
            guidance=guidance if self.guidance is None else self.guidance,
            scheduler=self.scheduler or scheduler,
            height=self.height or size[0],
            width=self.width or size[1],
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


def _guidance(value: object) -> float:
    """A guidance scale of Python or NumPy as Python's. Raises SettingsError."""
    # `True` is a number in Python, but not meant as one
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number: Any = value if real else math.nan
    _require(
        # compared before it is converted: an int may be larger than any float
        -MOST_GUIDANCE <= number <= MOST_GUIDANCE,
        f"guidance must be a finite number up to {MOST_GUIDANCE}, got {value!r}",
    )
    return float(number)


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

    picture: file path, PIL image or array, as `pictures.open_picture` takes them. object_mask: the
    object in white (half of full scale or more), the same kinds; its pixels are blacked out. Leave
    it None when the picture is already cut out. noise: `fresh` draws new background noise for every
    denoiser call, as released; `fixed` draws once per timestep, so that the background keys and
    values are computed once and reused by every later batch. noise_seed: seeds either kind, so that
    a pair stays a function of its recipe.
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
        object.__setattr__(self, "noise_seed", require_seed(self.noise_seed, "noise_seed"))
        for name in ("picture", "object_mask"):
            value = getattr(self, name)
            if isinstance(value, str | Path) and not Path(value).is_file():
                raise SettingsError(f"background {name}: no file {str(value)!r}")


# more would leave nothing of most pictures
MOST_EDGE = 16


@dataclass(frozen=True)
class Placement:
    """Where the defect goes, on a normal picture of the user's: the rest stays as it is.

    picture, region: file path, PIL image or array, as `pictures.open_picture` takes them, of one
    size; the region is white where the defect goes. Or region: `RegionStatistics`, by which a
    region is sampled on the object for the pair's seed. object_mask: the object in white, on which
    the region must lie; "all" for a texture, which is all object; None: found by its colour where
    it is needed. edge: width of the soft edge around the region, in latent pixels (8 picture pixels
    each in Stable Diffusion), 0 to 16. paste: whether pixels outside region and edge are the normal
    picture's own; else they are the VAE's reconstruction of them.
    """

    picture: Any
    region: Any
    object_mask: Any = None
    edge: float = 2.0
    paste: bool = True

    def __post_init__(self) -> None:
        real = isinstance(self.edge, numbers.Real) and not isinstance(self.edge, bool)
        _require(
            real and 0 <= self.edge <= MOST_EDGE,
            f"placement edge must be from 0 to {MOST_EDGE} latent pixels, got {self.edge!r}",
        )
        object.__setattr__(self, "edge", float(self.edge))
        _require(
            isinstance(self.paste, bool), f"placement paste must be a bool, got {self.paste!r}"
        )
        _require(self.region is not None, "placement region is None: pass a picture of it")
        for name in ("picture", "region", "object_mask"):
            value = getattr(self, name)
            named = isinstance(value, str | Path) and not (name == "object_mask" and value == "all")
            if named and not Path(value).is_file():
                raise SettingsError(f"placement {name}: no file {str(value)!r}")


def require_seed(seed: object, name: str = "seed") -> int:
    """Seeds are what `torch.Generator.manual_seed` takes without wrapping: 0 … 2^63-1."""
    value = whole_number(seed)
    if value is None:
        raise SettingsError(f"{name} must be a whole number, got {seed!r}")
    _require(0 <= value < 2**63, f"{name} must be from 0 to 2^63-1, got {value}")
    return value


def size_of(size: int | Sequence[int] | None) -> tuple[int | None, int | None]:
    """(height, width) in pixels of one number or two; (None, None) of None."""
    if size is None:
        return None, None
    side = whole_number(size)
    if side is not None:
        return side, side
    sides = _several(size)
    if sides is not None and len(sides) == 2:
        return sides[0], sides[1]
    raise SettingsError(f"size must be one number or (height, width), got {size!r}")


def _several(value: object) -> list[Any] | None:
    """The elements of a list, range, array or tensor; None of a single value or of text."""
    if isinstance(value, str | bytes | bytearray | dict) or not isinstance(value, Iterable):
        return None
    try:
        return list(value)
    # arrays without dimensions are iterable by their class alone
    except TypeError:
        return None


_SIZE = re.compile(r"(\d{1,5})(?:x(\d{1,5}))?")


def size_from_text(text: str, option: str = "--size") -> tuple[int, int]:
    """(height, width) in pixels of "512" or "512x768". Raises SettingsError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise SettingsError(f"{option} must be 512 or 512x768 (HEIGHTxWIDTH), got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def seeds_of(
    n: int | Sequence[int] | None, seeds: int | Sequence[int] | None, given: int | None
) -> tuple[int, ...]:
    """One seed per pair; n: how many, or the seeds; given: how many pairs have latents given."""
    if seeds is None and (listed := _several(n)) is not None:
        n, seeds = None, listed
    if seeds is not None:
        listed = _several(seeds)
        chosen = tuple(require_seed(s) for s in ([seeds] if listed is None else listed))
        if n is not None and whole_number(n) != len(chosen):
            raise SettingsError(f"n is {n} but there are {len(chosen)} seeds: give one of them")
    else:
        count = _count("n", (given or 1) if n is None else n, "a positive whole number", 1)
        chosen = tuple(secrets.randbits(32) for _ in range(count))
    if not chosen:
        raise SettingsError("seeds is empty: nothing to generate")
    if given is not None and given != len(chosen):
        raise SettingsError(f"latents hold {given} pairs, asked for {len(chosen)}")
    return chosen


def batch_of(batch: int | None, max_batch: int, pairs: int) -> int:
    if batch is None:
        return min(max_batch, pairs)
    expected = f"from 1 to {max_batch} (max_batch of the engine)"
    return _count("batch", batch, expected, 1, max_batch)


def max_batch_of(max_batch: int | None) -> int | None:
    if max_batch is None:
        return None
    return _count("max_batch", max_batch, "a positive whole number", 1)
