"""The job: which pairs of which defects, from what, and by which rules. `job.yaml` is this object.

Needs the extra `dataset` (pydantic).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

from dualdiff_engine import settings

# numbers have six digits
MOST_PAIRS = 1_000_000
DEMO = "demo"
# every pixel is the object's
ALL = "all"
# names of devices that Windows keeps for itself
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_NAME = re.compile(r"[^\W_][\w .+-]{0,63}")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*(KiB|MiB|GiB|TiB|kB|MB|GB|TB)?")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS |= {"kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _name(text: str) -> str:
    if not _NAME.fullmatch(text) or text != text.strip(" .") or _RESERVED.fullmatch(text):
        raise ValueError(
            f"{text!r} cannot be a folder everywhere: use 1 to 64 letters, digits, -, _, + and "
            "dots, and start with a letter or digit"
        )
    return text


def _path(text: str, info: ValidationInfo) -> str:
    """Relative to the job file's folder, if there is one; demo:… stays."""
    root = (info.context or {}).get("root")
    if not text or "\0" in text:
        raise ValueError("it is empty: write a path")
    if root is None or text == DEMO or text.startswith(f"{DEMO}:"):
        return text
    return str(Path(root) / Path(text).expanduser())


def _masks(text: str, info: ValidationInfo) -> str:
    """As a path; "all" stays."""
    return text if text == ALL else _path(text, info)


def _base(text: str, info: ValidationInfo) -> str:
    """A folder, or a hub id, which has no folder of its name."""
    path = _path(text, info)
    return path if Path(path).exists() else text


def _bytes(value: Any) -> Any:
    match = _BYTES.fullmatch(value.strip()) if isinstance(value, str) else None
    return round(float(match[1]) * _UNITS.get(match[2] or "", 1)) if match else value


Name = Annotated[str, AfterValidator(_name)]
PathText = Annotated[str, AfterValidator(_path)]
Bound = Annotated[float, Field(allow_inf_nan=False)] | Annotated[str, Field(pattern=r"^p\d{1,2}$")]
Bounds = tuple[Bound | None, Bound | None]
ScoreGate = Literal["record"] | Bounds


class Part(BaseModel):
    """What all parts of a job have in common: no unknown fields, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Words(Part):
    """The prompts of a defect's adapter."""

    image: str = settings.IMAGE_PROMPT
    """Of the image branch."""
    anomaly: str = settings.ANOMALY_PROMPT
    """Of the anomaly branch."""
    negative: str = ""
    """Of both."""


class Defect(Part):
    """Pairs of one defect of one product."""

    product: Name
    """Name of the product: a folder."""
    defect: Name
    """Name of the defect: a folder."""
    adapter: PathText
    """Adapter file, its folder, or checkpoint-N; demo:washer/chip and others are in the package."""
    pairs: int = Field(ge=1, le=MOST_PAIRS)
    """How many accepted pairs are wanted."""
    pictures: PathText | None = None
    """Normal pictures: a file, a folder or a pattern such as good/*.png; demo:16 makes 16 parts of
    the demo's product. Without, whole pictures are drawn."""
    use: Literal["auto", "canvas", "background"] = "auto"
    """What pictures are for: a canvas that the defect is placed on, or the background of an adapter
    that was trained with one. auto: background for such adapters, else canvas."""
    object_masks: Annotated[str, AfterValidator(_masks)] | None = None
    """The object in white: a folder with a mask of the same name (or NAME_mask) per picture, a file
    for all, or "all" for a texture."""
    regions: PathText | None = None
    """On a canvas, where the defect goes: as object_masks. Default: sampled like region_masks."""
    region_masks: PathText | None = None
    """Folder with masks of real defects, such as those of the training: regions are sampled like
    them, and the quantiles of gates are learnt from them."""
    edge: Annotated[float, Field(ge=0, le=settings.MOST_EDGE)] | None = None
    """On a canvas, the soft edge around the region, in latent pixels. Default: 2."""
    paste: Literal["none", "region", "mask"] | None = None
    """On a canvas, where the drawn pixels are kept. Default: region."""
    window: Literal["auto"] | Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """On a canvas, draw only a window around the region: auto, or its side over the region's."""
    mask: Literal["anomaly", "change", "both"] = "anomaly"
    """What masks are made from; change and both need a canvas."""
    prompts: Words | None = None
    """Default: the adapter's own where it has some, else the released ones."""

    @property
    def name(self) -> str:
        """product/defect."""
        return f"{self.product}/{self.defect}"

    @model_validator(mode="after")
    def _fits(self) -> Defect:
        given = {"object_masks", "regions", "region_masks", "edge", "paste", "window"}
        if self.pictures is None and (lone := sorted(given & self.model_fields_set - _LEARNT)):
            raise ValueError(f"{lone[0]} needs pictures: add them, or leave it out")
        if self.pictures is None and self.mask != "anomaly":
            raise ValueError(f"mask {self.mask} needs pictures: add them, or leave it out")
        if self.regions is not None and self.window is None and self.use == "background":
            raise ValueError("regions need a canvas: leave out use: background")
        return self


# region_masks also teach the gates
_LEARNT = {"region_masks"}


class Sampling(Part):
    """How noise becomes pictures, as in `dualdiff_engine.Sampling`; defaults are the adapter's."""

    preset: str | None = None
    """released, fast or draft: fills in what is not given."""
    steps: int | None = None
    """Scheduler steps."""
    guidance: float | None = None
    """Guidance scale."""
    scheduler: str | None = None
    """Class name of a diffusers scheduler."""
    size: int | tuple[int, int] | None = None
    """Pixels: one number, or [height, width]."""
    spacing: settings.Spacing | None = None
    """Of the timesteps."""
    order: int | None = None
    """Of the solver."""
    karras: bool | None = None
    """Noise levels as in Karras et al. 2022."""
    skip_prk: bool | None = None
    """Start PNDM without its Runge-Kutta steps."""
    timesteps: tuple[int, ...] | None = None
    """The timesteps themselves, descending."""

    @model_validator(mode="after")
    def _fits(self) -> Sampling:
        self.chosen()
        return self

    def chosen(self) -> settings.Sampling:
        """As the engine takes it. Raises SettingsError, a ValueError."""
        height, width = settings.size_of(self.size)
        values = self.model_dump(exclude={"size"})
        return settings.Sampling(**values, height=height, width=width)


class Limits(Part):
    """What a run may take."""

    batch: Literal["auto"] | Annotated[int, Field(ge=1, le=4096)] = "auto"
    """Pairs computed at once; halved where they do not fit. auto: 4 on a CPU, 32 on a GPU."""
    vram: Annotated[int, Field(ge=1)] | None = None
    """Most memory of a GPU that a worker takes, such as 20GiB."""
    attempts: Annotated[int, Field(ge=1, le=64)] = 5
    """How often a pair is drawn until the gates let it pass."""
    hang: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 900.0
    """Seconds without a step or a finished pair after which a worker hangs and is ended."""

    @model_validator(mode="before")
    @classmethod
    def _sizes(cls, values: Any) -> Any:
        if isinstance(values, dict) and "vram" in values:
            return {**values, "vram": _bytes(values["vram"])}
        return values


class Gates(Part):
    """Which pairs are good. Scores of a gate that says record are kept and reject nothing; [low,
    high] rejects what is outside; null is no bound; p01 is a quantile of the real masks."""

    not_finite: Literal["reject"] = "reject"
    """Latents or pictures with NaN or infinity."""
    black: Literal["reject", "record"] = "reject"
    """A picture that is black. One colour, whichever, is always rejected."""
    empty: Literal["reject", "record"] = "reject"
    """A mask without a white pixel."""
    full: Literal["reject", "record"] = "reject"
    """A mask without a black pixel."""
    agreement: ScoreGate = "record"
    """1 - mean |image - anomaly image| in the mask, in [0, 1]: whether the branches agree."""
    area: ScoreGate = "record"
    """Share of the picture in the mask."""
    parts: ScoreGate = "record"
    """Connected parts of the mask, without crumbs of 5 % of its area."""
    change_inside: ScoreGate = "record"
    """On a canvas, the mean change in the mask."""
    change_outside: ScoreGate = "record"
    """On a canvas, the mean change outside the mask and a margin."""
    change_share: ScoreGate = "record"
    """On a canvas, the share of the visible change in the mask and the margin."""

    @model_validator(mode="after")
    def _fits(self) -> Gates:
        for name, value in self:
            if isinstance(value, str):
                continue
            if any(isinstance(b, str) for b in value) and name not in LEARNT:
                raise ValueError(
                    f"{name}: quantiles are known of {' and '.join(LEARNT)}: use numbers"
                )
            numbers = [b for b in value if isinstance(b, float | int)]
            if numbers != sorted(numbers):
                raise ValueError(f"{name}: its low bound is above the high one: swap them")
        return self


# gates whose quantiles real masks tell
LEARNT = ("area", "parts")


class Machine(Part):
    """What the engine runs on, as in `Engine.from_pretrained`."""

    device: str = "auto"
    """cpu, cuda, or auto: every GPU, else the CPU."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the networks."""
    backend: str = "auto"
    """auto, a backend that `dualdiff doctor` lists, or op=name,…"""
    tune: Literal["auto", "never"] = "auto"
    """Whether a GPU's fastest kernels are measured once."""
    allow_pickle: bool = False
    """Open .bin adapters that you trust."""
    offline: bool = False
    """Never download a base model."""


class Job(Part):
    """A dataset to make."""

    base: Annotated[str, AfterValidator(_base)]
    """Stable Diffusion folder or hub id; demo is the model that ships with the package."""
    out: PathText
    """Folder of the dataset. What it holds is not drawn again."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """A pair's seed is a hash of this, its product, defect, number and attempt."""
    defects: tuple[Defect, ...] = Field(min_length=1)
    """What to draw."""
    good: dict[str, PathText | Annotated[float, Field(ge=0, lt=1)]] = {}
    """Product -> folder of normal pictures, for the exported formats; held_out: the share of them
    that goes to the test split."""
    formats: tuple[str, ...] = ()
    """What the finished dataset is exported to, under out/formats: mvtec, yolo, …"""
    sampling: Sampling = Sampling()
    """How all of them are drawn."""
    limits: Limits = Limits()
    """Memory, attempts and patience of a run."""
    gates: Gates = Gates()
    """Which pairs are good."""
    engine: Machine = Machine()
    """What the pairs are drawn on."""
    workers: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    """Processes of this machine. auto: one per GPU, or one."""

    @model_validator(mode="before")
    @classmethod
    def _no_ray(cls, values: Any) -> Any:
        workers = values.get("workers") if isinstance(values, dict) else None
        if isinstance(workers, str) and workers.startswith("ray"):
            raise ValueError(
                f"workers {workers} is not supported: run dualdiff make --shard i/n on each machine"
            )
        return values

    @model_validator(mode="after")
    def _fits(self) -> Job:
        # a file system may not tell Chip from chip
        names = [defect.name.casefold() for defect in self.defects]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ValueError(f"{self.defects[number].name} is listed twice: give it once")
        for product, folder in self.good.items():
            if (product == "held_out") != isinstance(folder, float):
                raise ValueError(f"good.{product}: write product: folder, and held_out: 0.2")
        products = {defect.product for defect in self.defects}
        if strangers := sorted(self.good.keys() - products - {"held_out"}):
            raise ValueError(f"good.{strangers[0]}: no defect is of this product: leave it out")
        if len(set(self.formats)) < len(self.formats):
            raise ValueError("formats: one is listed twice: give it once")
        return self

    @property
    def root(self) -> Path:
        """The dataset's folder."""
        return Path(self.out)
