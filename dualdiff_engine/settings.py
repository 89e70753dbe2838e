"""What a caller may choose: frozen, validated on construction, recorded with every pair."""

from __future__ import annotations

import math
import numbers
import operator
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
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
# of a distilled adapter: its conditional prediction is the guided one
HELD = 1.0
BACKGROUND_STEPS, BACKGROUND_GUIDANCE = 50, 2.0

# options of the scheduler itself, which only some schedulers have
SCHEDULE = ("spacing", "order", "karras", "skip_prk", "timesteps")
SPACINGS = ("linspace", "leading", "trailing")
Spacing = Literal["linspace", "leading", "trailing"]


@dataclass(frozen=True)
class Sampling:
    """How noise becomes clean latents. What is None takes its default when a run starts.

    Args:
        steps: Scheduler steps, 1 to 1000. Some schedulers make more denoiser calls than steps.
            Default: 100, with a background 50, as released.
        guidance: Classifier-free guidance scale of both branches. At 1 or below, the unconditional
            rows are not computed. Default: 2.5, with a background 2.0, as released.
        scheduler: Class name of a diffusers scheduler. Default: the base model's own.
        height: Pixels, a multiple of 8 from 8 to 8192. Default: the base model's own size.
        width: As height.
        preset: A name in `PRESETS`, which fills in what is None here. Default: none, which is the
            same as `released`.
        spacing: Where the timesteps lie: linspace, leading or trailing (`timestep_spacing`).
        order: Order of the solver, 1 to 3 (`solver_order`).
        karras: Noise levels as in Karras et al. 2022 (`use_karras_sigmas`).
        skip_prk: Start PNDM without its Runge-Kutta steps, as Stable Diffusion does
            (`skip_prk_steps`).
        timesteps: The timesteps themselves, whole numbers in descending order; as many steps.

    The last five are diffusers' options, their default is the base model's; a run refuses those
    that its scheduler does not have.

    Raises:
        SettingsError: A value is out of range.
    """

    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    preset: str | None = None
    spacing: Spacing | None = None
    order: int | None = None
    karras: bool | None = None
    skip_prk: bool | None = None
    timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_schedule()
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

    def _check_schedule(self) -> None:
        if self.preset is not None:
            fits = isinstance(self.preset, str) and self.preset in PRESETS
            _require(fits, f"no preset {self.preset!r}: choose one of {', '.join(PRESETS)}")
        fits = self.spacing is None or self.spacing in SPACINGS
        _require(fits, f"spacing must be one of {', '.join(SPACINGS)}, got {self.spacing!r}")
        if self.order is not None:
            order = _count("order", self.order, "a whole number from 1 to 3", 1, 3)
            object.__setattr__(self, "order", order)
        for name in ("karras", "skip_prk"):
            value = getattr(self, name)
            fits = value is None or isinstance(value, bool)
            _require(fits, f"{name} must be true or false, got {value!r}")
        if self.timesteps is not None:
            times = _timesteps(self.timesteps)
            object.__setattr__(self, "timesteps", times)
            _require(
                self.steps in (None, len(times)),
                f"steps is {self.steps} but there are {len(times)} timesteps: leave out steps",
            )

    def expanded(self) -> Sampling:
        """The same with the preset's values where none are given.

        Another scheduler than the preset's takes only its steps; given timesteps replace its steps
        and spacing.
        """
        if self.preset is None:
            return self
        preset = asdict(PRESETS[self.preset])
        if self.scheduler not in (None, preset["scheduler"]):
            preset = {"steps": preset["steps"]}
        if self.timesteps is not None:
            preset |= {"steps": None, "spacing": None}
        added = {name: v for name, v in preset.items() if getattr(self, name) is None}
        return replace(self, **added)

    def filled(
        self,
        *,
        background: bool,
        scheduler: str,
        size: tuple[int, int],
        held_guidance: float | None = None,
    ) -> ChosenSampling:
        """The same with every default in place.

        Args:
            background: Whether the run has a background.
            scheduler: The base model's own scheduler.
            size: The base model's own (height, width) in pixels.
            held_guidance: The guidance that the adapter itself holds, if it is distilled.

        Raises:
            SettingsError: The guidance or the preset does not suit the adapter.
        """
        chosen = self.expanded()
        _check_held(chosen, held_guidance)
        steps, guidance = (
            (BACKGROUND_STEPS, BACKGROUND_GUIDANCE) if background else (PLAIN_STEPS, PLAIN_GUIDANCE)
        )
        if held_guidance is not None:
            guidance = HELD
        if chosen.timesteps is not None:
            steps = len(chosen.timesteps)
        return ChosenSampling(
            steps=steps if chosen.steps is None else chosen.steps,
            guidance=guidance if chosen.guidance is None else chosen.guidance,
            scheduler=chosen.scheduler or scheduler,
            height=chosen.height or size[0],
            width=chosen.width or size[1],
            preset=chosen.preset,
            schedule={n: v for n in SCHEDULE if (v := getattr(chosen, n)) is not None},
        )


def _check_held(chosen: Sampling, held: float | None) -> None:
    """An adapter that holds guidance takes no other; the preset of such adapters needs one."""
    if held is not None and chosen.guidance not in (None, HELD):
        raise SettingsError(
            f"the adapter holds guidance {held:g} and takes no other, got {chosen.guidance:g}: "
            "leave out guidance, or draw with the adapter that it was distilled from"
        )
    if held is None and chosen.preset == DISTILLED:
        raise SettingsError(
            f"preset {DISTILLED} needs an adapter that holds guidance, and this one does not: use "
            "preset fast, or distil it (dualdiff train --distill-guidance)"
        )


# Complete choices by name. `fast`: 20 guided calls of DPM-Solver++ come nearer to the converged
# solution than the released 101 (`dualdiff eval preset`). `draft`: to see whether a prompt works.
# `distilled`: for adapters that hold guidance, half the work of `fast`.
_SOLVER = {"scheduler": "DPMSolverMultistepScheduler", "spacing": "trailing", "order": 2}
PRESETS: Mapping[str, Sampling] = {
    "released": Sampling(),
    "fast": Sampling(steps=20, **_SOLVER),  # type: ignore[arg-type]
    "draft": Sampling(steps=10, **_SOLVER),  # type: ignore[arg-type]
    "distilled": Sampling(steps=20, **_SOLVER),  # type: ignore[arg-type]
}
RELEASED, DISTILLED = "released", "distilled"
# the presets that are compared with the released one, by whether the adapter holds guidance
MEASURED: Mapping[bool, tuple[str, ...]] = {False: ("fast", "draft"), True: (DISTILLED,)}


@dataclass(frozen=True)
class ChosenSampling:
    """A `Sampling` without open choices, as a run uses and records it.

    schedule: the options of the scheduler that were chosen, by their names in `Sampling`; the base
    model's hold for the others.
    """

    steps: int
    guidance: float
    scheduler: str
    height: int
    width: int
    preset: str | None = None
    schedule: Mapping[str, Any] = field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """The values that decide about a pair, JSON-ready: what `Sampling` takes back."""
        values = {**asdict(self), **self.schedule}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in ("preset", "schedule")
        }

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


def _timesteps(value: object) -> tuple[int, ...]:
    """Custom timesteps as Python's numbers. Raises SettingsError."""
    numbers_of = [whole_number(one) for one in _several(value) or ()]
    times = tuple(one for one in numbers_of if one is not None)
    falling = all(a > b for a, b in pairwise(times)) and min(times, default=-1) >= 0
    _require(
        len(times) == len(numbers_of) and falling and len(times) <= 1000,
        "timesteps must be 1 to 1000 whole numbers in descending order, such as [999, 500, 100], "
        f"got {str(value)[:80]}",
    )
    return times


def sampling_of(
    sampling: Sampling | None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    size: int | Sequence[int] | None = None,
    preset: str | None = None,
) -> Sampling:
    """One `Sampling` of an object or of single values. Raises SettingsError when both are given."""
    height, width = size_of(size)
    single = Sampling(steps, guidance, scheduler, height, width, preset)
    if sampling is None:
        return single
    _require(isinstance(sampling, Sampling), f"sampling must be Sampling(...), got {sampling!r}")
    _require(
        single == Sampling(),
        "give sampling=Sampling(...) or steps, guidance, scheduler, size and preset, not both",
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


PASTES = ("none", "region", "mask", "difference")
# more would leave nothing of most pictures
MOST_EDGE = 16
# the window's side over the region's
WindowRatio = float | Literal["auto"]


@dataclass(frozen=True)
class Placement:
    """Where the defect goes, on a normal picture of the user's: the rest stays as it is.

    picture, region: file path, PIL image or array, as `pictures.open_picture` takes them, of one
    size; the region is white where the defect goes. Or region: `RegionStatistics`, by which a
    region is sampled on the object for the pair's seed. object_mask: the object in white, on which
    the region must lie; "all" for a texture, which is all object; None: found by its colour where
    it is needed. edge: width of the soft edge around the region, in latent pixels (8 picture pixels
    each in Stable Diffusion), 0 to 16. paste: "region" (or True): pixels outside region and edge
    are the normal picture's own; "mask": those outside the mask of the defect and half a latent
    pixel around it, so what the mask calls normal is; "difference": in region and edge, what was
    drawn less the same place as the VAE rebuilds it is added to the normal picture, whose grain and
    sharpness stay; "none" (or False): all are the decoder's.
    window: None: the whole picture is drawn, at the size of the run. Else only a window around the
    region is, and the pair has the picture's size: the shorter side of the window over the longer
    side of the region's bounding box, 1 or more; "auto": as the adapter was trained, if that was on
    windows; else 2, and no less than the size of the run.
    """

    picture: Any
    region: Any
    object_mask: Any = None
    edge: float = 2.0
    paste: bool | str = True
    window: WindowRatio | None = None

    def __post_init__(self) -> None:
        real = isinstance(self.edge, numbers.Real) and not isinstance(self.edge, bool)
        _require(
            real and 0 <= self.edge <= MOST_EDGE,
            f"placement edge must be from 0 to {MOST_EDGE} latent pixels, got {self.edge!r}",
        )
        object.__setattr__(self, "edge", float(self.edge))
        named = self.paste
        if isinstance(named, bool):
            named = "region" if named else "none"
        _require(
            named in PASTES, f"placement paste must be one of {', '.join(PASTES)}, got {named!r}"
        )
        object.__setattr__(self, "paste", named)
        object.__setattr__(self, "window", window_of(self.window))
        _require(self.region is not None, "placement region is None: pass a picture of it")
        for name in ("picture", "region", "object_mask"):
            value = getattr(self, name)
            named = isinstance(value, str | Path) and not (name == "object_mask" and value == "all")
            if named and not Path(value).is_file():
                raise SettingsError(f"placement {name}: no file {str(value)!r}")


def window_of(value: object) -> WindowRatio | None:
    """A `Placement.window`, checked. Raises SettingsError."""
    if value is None or (isinstance(value, str) and value == "auto"):
        return value  # type: ignore[return-value]
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number: Any = value if real else math.nan
    _require(
        1 <= number < math.inf,
        "placement window must be 'auto' or 1 and more (its side over the region's), got "
        f"{value!r}",
    )
    return float(number)


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
