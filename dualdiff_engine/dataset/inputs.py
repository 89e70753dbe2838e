"""What a job names, found and checked before a model loads: adapters, pictures, masks, space."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dualdiff_engine import adapters
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.dataset.job import ALL, DEMO, Defect, Job
from dualdiff_engine.demo import presets as demo
from dualdiff_engine.errors import DataError, DualDiffError, SettingsError
from dualdiff_engine.files import sha256_of
from dualdiff_engine.pictures import open_picture
from dualdiff_engine.pipeline.regions import RegionStatistics, region_statistics
from dualdiff_engine.settings import Background, Placement, Prompts, Sampling
from dualdiff_engine.training.data import SUFFIXES, pictures_in

# of the parts that demo:N makes; no adapter was trained or tested on them
DEMO_SEED = 7_000_000
_MOST_DEMO = 10_000
# PNG of noise is as large as its pixels: an image, and half as much for its black neighbour
_BYTES_PER_PIXEL = 4.5


@dataclass(frozen=True)
class Picture:
    """A normal picture: its file, or the seed of a demo part; object and region by file."""

    name: str
    file: Path | None
    demo_seed: int = 0
    object_mask: Path | str | None = None
    region: Path | None = None

    @property
    def files(self) -> list[Path]:
        return [f for f in (self.file, self.object_mask, self.region) if isinstance(f, Path)]


@dataclass(frozen=True)
class Source:
    """What the pairs of a defect are drawn with. pictures: none, or one for each in turn."""

    spec: Defect
    adapter: Path
    preset: demo.Preset | None
    pictures: tuple[Picture, ...]
    sampling: Sampling

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def prompts(self) -> Prompts | None:
        """None: the adapter's own, or the released ones."""
        if self.spec.prompts is not None:
            return Prompts(**self.spec.prompts.model_dump())
        return self.preset.prompts if self.preset else None

    def picture_of(self, number: int) -> int:
        """Which picture a pair is drawn on; 0 without pictures."""
        return number % max(len(self.pictures), 1)

    @cached_property
    def statistics(self) -> RegionStatistics | None:
        """Of real masks, where they are known. Raises SettingsError."""
        masks = self.masks
        return region_statistics(masks) if masks else None

    @cached_property
    def masks(self) -> Sequence[Any]:
        """Real masks of the defect: files, or arrays for the demo."""
        if self.spec.region_masks is not None:
            return pictures_in(Path(self.spec.region_masks))
        if self.preset is not None:
            from dualdiff_engine.demo.train.adapters import training_masks

            return training_masks(self.preset)
        return ()

    def as_background(self, trained: bool) -> bool:
        """Whether the pictures are backgrounds; trained: whether the adapter was with one."""
        if self.spec.use == "auto":
            return trained
        return self.spec.use == "background"

    def placement(self, picture: Picture) -> Placement:
        """Of a canvas. Raises SettingsError."""
        names = ("edge", "paste", "window")
        how = {n: v for n in names if (v := getattr(self.spec, n)) is not None}
        region: Any = picture.region or self.statistics
        if picture.file is None:
            assert self.preset is not None
            return self.preset.placement(picture.demo_seed, region, **{"paste": "mask", **how})
        return Placement(picture.file, region, picture.object_mask, **how)

    def background(self, picture: Picture) -> Background:
        """Of a picture that lends its surroundings. Raises SettingsError."""
        if picture.file is None:
            assert self.preset is not None
            return self.preset.options(picture.demo_seed)["background"]
        mask = picture.object_mask
        return Background(picture.file, None if mask == ALL else mask, "fixed")


def base_of(job: Job) -> str:
    """The base model's folder or hub id."""
    return str(demo.BASE) if job.base == DEMO else job.base


def sources(job: Job) -> list[Source]:
    """What each defect is drawn with, found but not opened. Raises SettingsError, DataError."""
    return [
        _named(f"defects[{n}] ({spec.name})", lambda spec=spec: _source(job, spec))
        for n, spec in enumerate(job.defects)
    ]


def _named(where: str, call: Any) -> Any:
    """What a call returns; its errors say where."""
    try:
        return call()
    except DualDiffError as error:
        kind = type(error) if isinstance(error, SettingsError | DataError) else SettingsError
        raise kind(f"{where}: {error}") from error


def _source(job: Job, spec: Defect) -> Source:
    preset, adapter = None, Path(spec.adapter)
    if spec.adapter.startswith(f"{DEMO}:"):
        preset = demo.find(spec.adapter.partition(":")[2])
        adapter = preset.adapter
    elif not adapter.exists():
        raise SettingsError(f"adapter: no file or folder {spec.adapter!r}: check the path")
    found = _pictures(spec, preset)
    source = Source(spec, adapter, preset, tuple(found), _sampling(job, preset))
    canvas = found and spec.use != "background" and spec.regions is None
    if canvas and not source.masks and spec.use == "canvas":
        raise SettingsError(_WHERE)
    if spec.region_masks is not None and not source.masks:
        raise SettingsError(f"region_masks: {spec.region_masks} holds no pictures: check the path")
    return source


_WHERE = (
    "where does the defect go? Add regions, or region_masks: a folder with masks of real defects, "
    "and regions like them are sampled on the object"
)


def _sampling(job: Job, preset: demo.Preset | None) -> Sampling:
    """The job's; for the demo's adapters what suits them where nothing is given."""
    chosen = job.sampling.chosen()
    if preset is None or chosen.preset is not None:
        return chosen
    own = {**demo.SAMPLING, "steps": demo.SAMPLING["steps"] if chosen.timesteps is None else None}
    return replace(chosen, **{n: v for n, v in own.items() if getattr(chosen, n) is None})


def _pictures(spec: Defect, preset: demo.Preset | None) -> list[Picture]:
    given = spec.pictures
    if given is None:
        return []
    if given == DEMO or given.startswith(f"{DEMO}:"):
        return _demo_pictures(given, spec, preset)
    objects = _Masks.of(spec.object_masks, "object_masks")
    regions = _Masks.of(spec.regions, "regions")
    return [
        Picture(path.name, path, 0, objects.of_picture(path), regions.file_of(path))
        for path in _matching(given)
    ]


def _demo_pictures(given: str, spec: Defect, preset: demo.Preset | None) -> list[Picture]:
    count = given.partition(":")[2] or "16"
    if preset is None:
        raise SettingsError(f"pictures: {given} is for the demo's adapters: pass a folder")
    if not count.isdecimal() or not 1 <= int(count) <= _MOST_DEMO:
        raise SettingsError(f"pictures: write {DEMO}:16, with 1 to {_MOST_DEMO} parts, not {given}")
    if spec.object_masks is not None or spec.regions is not None:
        raise SettingsError(f"pictures: {given} knows its objects: leave out object_masks, regions")
    return [Picture(f"{DEMO}:{n}", None, DEMO_SEED + n) for n in range(int(count))]


def _matching(given: str) -> list[Path]:
    """The pictures of a file name, a folder or a pattern, by name. Raises SettingsError."""
    path = Path(given)
    if path.is_file():
        return [path]
    if path.is_dir():
        found: Iterable[Path] = pictures_in(path)
    else:
        matches = sorted(Path(name) for name in glob.glob(given))  # noqa: PTH207
        found = [match for match in matches if match.suffix.lower() in SUFFIXES]
    if not (chosen := list(found)):
        raise SettingsError(f"pictures: there are none at {given!r}: check the path or pattern")
    return chosen


@dataclass(frozen=True)
class _Masks:
    """A mask for all pictures, or a folder with one of each picture's name, by its stem."""

    field: str
    single: Path | str | None
    by_stem: dict[str, Path] | None = None

    @classmethod
    def of(cls, given: str | None, field: str) -> _Masks:
        path = None if given is None or given == ALL else Path(given)
        if path is None or path.is_file():
            return cls(field, path or given)
        if not path.is_dir():
            raise SettingsError(f"{field}: no file or folder {given!r}: check the path")
        by_stem: dict[str, Path] = {}
        for file in pictures_in(path):
            if (other := by_stem.setdefault(file.stem, file)) != file:
                raise DataError(f"{field}: {path} has {other.name} and {file.name}: keep one")
        return cls(field, path, by_stem)

    def of_picture(self, picture: Path) -> Path | str | None:
        if self.by_stem is None:
            return self.single
        for stem in (picture.stem, f"{picture.stem}_mask"):
            if stem in self.by_stem:
                return self.by_stem[stem]
        raise SettingsError(
            f"{self.field}: {self.single} has no mask of {picture.name}: add "
            f"{picture.stem}_mask.png"
        )

    def file_of(self, picture: Path) -> Path | None:
        found = self.of_picture(picture)
        return None if found is None else Path(found)


# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A job whose inputs are sound.

    identities: defect -> what decides about its pixels, JSON-ready. bytes_per_pair: most that the
    pictures of a pair of each defect take.
    """

    job: Job
    sources: tuple[Source, ...]
    identities: dict[str, dict[str, Any]]
    bytes_per_pair: dict[str, int]


def check(job: Job) -> Checked:
    """Open and check everything that a job names; no network is loaded.

    Raises BaseModelError, AdapterError, SettingsError, DataError.
    """
    found = sources(job)
    base = BaseModel(base_of(job), local_files_only=job.engine.offline)
    base.check()
    identities, space = {}, {}
    for number, source in enumerate(found):
        where = f"defects[{number}] ({source.name})"
        background, adapter = _adapter(job, source, base, where)
        _named(where, lambda source=source, b=background: _check_use(source, b))
        largest, content = _opened(source, where)
        size = source.sampling.height or base.picture_size[0], source.sampling.width
        pixels = size[0] * (size[1] or base.picture_size[1])
        if source.spec.window is not None and not source.as_background(background):
            pixels = largest or pixels
        space[source.name] = round(pixels * _BYTES_PER_PIXEL)
        identities[source.name] = _identity(job, source, base, adapter, background, content)
    for product, folder in job.good.items():
        if isinstance(folder, str) and not pictures_in(Path(folder)):
            raise SettingsError(f"good.{product}: {folder} holds no pictures: check the path")
    return Checked(job, tuple(found), identities, space)


def _adapter(job: Job, source: Source, base: BaseModel, where: str) -> tuple[bool, str]:
    """Whether an adapter needs a background, and its sha256; checked against the base."""

    def read() -> tuple[bool, str]:
        adapter = adapters.load(source.adapter, allow_pickle=job.engine.allow_pickle)
        adapters.check_fits(adapter, base.site_shapes, base.text_layers)
        summary = adapters.summary(adapter)
        return summary.background, summary.sha256

    return _named(where, read)


def _check_use(source: Source, background: bool) -> None:
    """Whether pictures and adapter fit each other. Raises SettingsError."""
    spec, as_background = source.spec, source.as_background(background)
    if background and not source.pictures:
        raise SettingsError("the adapter was trained with a background: add pictures")
    if source.pictures and as_background and not background:
        raise SettingsError(
            "the adapter was trained without a background: leave out use: background"
        )
    if not source.pictures or not as_background:
        if source.pictures and spec.regions is None and not source.masks:
            raise SettingsError(_WHERE)
        return
    for name in ("regions", "edge", "paste", "window"):
        if getattr(spec, name) is not None:
            raise SettingsError(f"{name} is for canvases, and these are backgrounds: use: canvas")
    if spec.mask != "anomaly":
        raise SettingsError(f"mask {spec.mask} is for canvases: use: canvas")


def _opened(source: Source, where: str) -> tuple[int, str]:
    """The most pixels of a picture, and a hash of all; every picture and mask is decoded once."""

    def size(picture: Picture) -> int:
        if picture.file is None:
            return 0
        opened = open_picture(picture.file, "picture", "RGB")
        for mask in picture.files[1:]:
            known = open_picture(mask, "mask", "L")
            if known.size != opened.size:
                raise SettingsError(
                    f"{mask} has {known.width} x {known.height} pixels, {picture.file} "
                    f"{opened.width} x {opened.height}: they must be of one size"
                )
        return opened.width * opened.height

    with ThreadPoolExecutor(4) as pool:
        pixels = _named(where, lambda: list(pool.map(size, source.pictures)))
        files = sorted({file for picture in source.pictures for file in picture.files})
        own = list(pool.map(sha256_of, files))
    _named(where, lambda: source.statistics)
    names = [picture.name for picture in source.pictures]
    content = hashlib.sha256(json.dumps([names, own]).encode()).hexdigest()
    return max(pixels, default=0), content


def _identity(
    job: Job, source: Source, base: BaseModel, adapter: str, background: bool, content: str
) -> dict[str, Any]:
    """What decides about a defect's pixels; places of files and the machine do not."""
    spec, statistics = source.spec, source.statistics
    chosen = source.sampling.filled(
        background=background,
        scheduler=type(base.scheduler).__name__,
        size=base.picture_size,
    )
    return {
        "seed": job.seed,
        "base": base.sha256,
        "adapter": adapter,
        "sampling": chosen.recorded(),
        "prompts": asdict(source.prompts) if source.prompts else None,
        "pictures": content if source.pictures else None,
        "use": "background" if source.as_background(background) else "canvas",
        "object": spec.object_masks == ALL,
        "canvas": [spec.edge, spec.paste, spec.window, spec.mask],
        "regions": statistics.record() if statistics and source.pictures else None,
    }


def area_of(mask: Any) -> float:
    """Share of white pixels of a real mask."""
    white = np.asarray(open_picture(mask, "mask", "L")) > 127
    return float(white.mean())
