"""What a pair is drawn on: the normal picture, the region of the defect, and its soft edge.

A `Placement` is opened and checked before anything is computed; `blend` keeps the latents outside
the region at every step, and `Canvas.paste` puts the picture's own pixels back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pictures import object_mask_fault, open_picture
from dualdiff_engine.pipeline.background import Surroundings, record_of
from dualdiff_engine.pipeline.blend import Blend, Level
from dualdiff_engine.pipeline.encode import PictureLatents, digest
from dualdiff_engine.pipeline.regions import RegionStatistics, find_object, sample_region
from dualdiff_engine.settings import Background, Placement

Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]

# placements whose opened pictures are kept: pairs of one batch often share them
_MOST_OPEN = 8


@dataclass(frozen=True)
class Opened:
    """A placement's pictures at the size of a run: uint8 [H, W, 3] and bool [H, W].

    region: None when it is sampled. object_mask: None when it was not needed.
    """

    picture: NDArray[np.uint8]
    region: Flags | None
    object_mask: Flags | None

    def surroundings(self) -> NDArray[np.uint8]:
        """The picture with the object black, uint8 [H, W, 3], as a background is cut."""
        assert self.object_mask is not None, "opened with need_object"
        return np.where(self.object_mask[..., None], np.uint8(0), self.picture)


@dataclass(frozen=True)
class Canvas:
    """What one pair is drawn on.

    picture: fp32 [3, H, W] in [0, 1], the normal picture. region: bool [H, W]. weight: fp32 [H, W],
    1 in the region, falling to 0 over the edge around it. change: fp32 [h, w], its mean over each
    latent pixel.
    """

    placement: Placement
    pixels: NDArray[np.uint8]
    region: Flags
    weight: Tensor
    change: Tensor

    @property
    def picture(self) -> Tensor:
        return torch.from_numpy(self.pixels).permute(2, 0, 1).float() / 255

    @property
    def statistics(self) -> RegionStatistics | None:
        """Of real masks, where the region was sampled by them."""
        region = self.placement.region
        return region if isinstance(region, RegionStatistics) else None

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The region, uint8 [H, W], 255 inside."""
        return np.where(self.region, np.uint8(255), np.uint8(0))

    def paste(self, image: Tensor, anomaly: Tensor) -> tuple[Tensor, Tensor]:
        """The drawn pictures [3, H, W] in the region, the normal one and black outside the edge."""
        if not self.placement.paste:
            return image, anomaly
        # where the weight is 0, lerp gives its first argument bit for bit
        return torch.lerp(self.picture, image, self.weight), anomaly * self.weight


class Canvases:
    """The canvases of a run: every placement is checked once, and opened again for its batches.

    placements: one per pair, or one for all. size: (height, width) in pixels; step: pixels per
    latent pixel. need_object: whether the background is made of the pictures. Raises SettingsError
    for the first placement that cannot be used.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        size: tuple[int, int],
        step: int,
        *,
        need_object: bool,
    ) -> None:
        self._placements, self._size, self._step = tuple(placements), size, step
        self._need_object = need_object
        self._open: OrderedDict[int, Opened] = OrderedDict()
        self._known: dict[int, dict[str, Any]] = {}
        for index in range(len(self._placements)):
            self._opened(index)
        self.records = [self._known[id(placement)] for placement in self._placements]

    def place(self, pair: int) -> int:
        """Index of a pair's placement and record."""
        return pair if len(self._placements) > 1 else 0

    def canvas(self, pair: int, seed: int) -> Canvas:
        """Of a pair, by its number in the request and its seed. Raises SettingsError."""
        index = self.place(pair)
        opened, placement = self._opened(index), self._placements[index]
        region = opened.region
        if region is None:
            assert opened.object_mask is not None
            drawn = sample_region(
                opened.object_mask, placement.region, seed, least=self._least_area
            )
            region = drawn > 0
        weight = edge_weight(region, placement.edge * self._step)
        return Canvas(
            placement,
            opened.picture,
            region,
            torch.from_numpy(weight),
            torch.from_numpy(pooled(weight, self._step)),
        )

    def backgrounds(self, noise: Tensor | None) -> tuple[Surroundings, ...]:
        """The pictures without their objects as backgrounds: one per pair, or one for all.

        noise: that replaces the background's draws.
        """
        return tuple(self._surroundings(index, noise) for index in range(len(self._placements)))

    def _surroundings(self, index: int, noise: Tensor | None) -> Surroundings:
        pixels = self._opened(index).surroundings()
        return Surroundings(
            record_of(Background(None), pixels, noise),
            lambda: self._opened(index).surroundings(),
        )

    @property
    def _least_area(self) -> int:
        return self._step**2

    def _name(self, index: int) -> str:
        return f"placement {index}" if len(self._placements) > 1 else "placement"

    def _opened(self, index: int) -> Opened:
        """One of the last ones, or opened again and compared with the first time."""
        placement, name = self._placements[index], self._name(index)
        # by identity: the placements are held as long as this object
        key = id(placement)
        if key not in self._open:
            need_object = self._need_object or isinstance(placement.region, RegionStatistics)
            fresh = opened(placement, name, self._size, self._step, need_object)
            record = _record(placement, fresh)
            if self._known.setdefault(key, record) != record:
                raise SettingsError(
                    f"{name} changed since the run began: leave its files as they are"
                )
            self._open[key] = fresh
        self._open.move_to_end(key)
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return self._open[key]


def _record(placement: Placement, opened: Opened) -> dict[str, Any]:
    """The placement's part of a recipe."""
    pictures = {
        "picture": opened.picture,
        "region": opened.region,
        "object_mask": opened.object_mask,
    }
    sampled = placement.region if isinstance(placement.region, RegionStatistics) else None
    return {
        **{f"{name}_sha256": None if x is None else digest(x) for name, x in pictures.items()},
        "statistics": sampled.record() if sampled else None,
        "edge": placement.edge,
        "paste": placement.paste,
    }


def listed(placement: Placement | Sequence[Placement] | None) -> tuple[Placement, ...] | None:
    """One for all, or one per pair. Raises SettingsError for what is neither."""
    if placement is None:
        return None
    several = [placement] if isinstance(placement, Placement) else placement
    if not isinstance(several, list | tuple) or not all(isinstance(p, Placement) for p in several):
        raise SettingsError(
            f"placement must be Placement(…) or a list of them, got {type(placement).__name__}"
        )
    if not several:
        raise SettingsError("placement is an empty list: give one per pair, or one for all")
    return tuple(several)


def opened(
    placement: Placement, name: str, size: tuple[int, int], step: int, need_object: bool
) -> Opened:
    """A placement's pictures at the size of a run. Raises SettingsError when they cannot be used.

    name: of the placement, for errors. size: (height, width) in pixels. step: pixels per latent.
    """
    picture = open_picture(placement.picture, f"{name} picture", "RGB")
    width, height = size[1], size[0]
    pixels = np.array(picture.resize((width, height), Image.Resampling.BICUBIC))
    object_mask = _object_mask(placement, name, picture, (width, height), pixels, need_object)
    region = None
    if not isinstance(placement.region, RegionStatistics):
        mask = open_picture(placement.region, f"{name} region", "L")
        _require_same_size(f"{name} region", mask, picture)
        region = _region(mask, name, (width, height), step)
        if object_mask is not None and not (region & object_mask).any():
            raise SettingsError(f"{name} region lies off the object: move it onto the object mask")
    return Opened(pixels, region, object_mask)


def _require_same_size(name: str, mask: Image.Image, picture: Image.Image) -> None:
    if mask.size != picture.size:
        raise SettingsError(f"{name} is {mask.size}, its picture {picture.size}: they must match")


def _shrunk(mask: Image.Image, size: tuple[int, int]) -> Flags:
    """A mask of 0 and 255 at another size (width, height): white where half of a pixel is."""
    return np.asarray(mask.resize(size, Image.Resampling.BOX)) > 127


def _region(mask: Image.Image, name: str, size: tuple[int, int], step: int) -> Flags:
    low, high = mask.getextrema()
    if high == 0:
        raise SettingsError(
            f"{name} region has no white pixel: draw the place of the defect in white"
        )
    if low == 255:
        raise SettingsError(
            f"{name} region is all white, so nothing of the picture is kept: draw a smaller one"
        )
    region = _shrunk(mask, size)
    if np.count_nonzero(region) < step**2:
        raise SettingsError(
            f"{name} region is smaller than a latent pixel ({step} x {step} pixels) at "
            f"{size[1]} x {size[0]}: draw a larger one, or pass a larger size"
        )
    return region


def _object_mask(
    placement: Placement,
    name: str,
    picture: Image.Image,
    size: tuple[int, int],
    pixels: NDArray[np.uint8],
    needed: bool,
) -> Flags | None:
    given = placement.object_mask
    if isinstance(given, str) and given == "all":
        return np.ones(pixels.shape[:2], np.bool_)
    if given is not None:
        mask = open_picture(given, f"{name} object_mask", "L")
        _require_same_size(f"{name} object_mask", mask, picture)
        if fault := object_mask_fault(mask):
            raise SettingsError(f"{name} object_mask {fault}")
        return _shrunk(mask, size)
    if not needed:
        return None
    try:
        return find_object(pixels)
    except SettingsError as error:
        raise SettingsError(f"{name} picture: {error}") from error


def edge_weight(region: Flags, edge: float) -> Floats:
    """fp32 [H, W]: 1 in the region, falling linearly to 0 at `edge` pixels from it; 0 beyond."""
    outside = np.where(region, np.uint8(0), np.uint8(1))
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    if edge <= 0:
        return region.astype(np.float32)
    return np.clip(1 - distance / edge, 0, 1).astype(np.float32)


def pooled(weight: Floats, step: int) -> Floats:
    """The mean [h, w] over each latent pixel of a weight [H, W]."""
    height, width = weight.shape[0] // step, weight.shape[1] // step
    return weight.reshape(height, step, width, step).mean(axis=(1, 3), dtype=np.float32)


@dataclass(frozen=True)
class Placed:
    """The canvases of a batch, and what `Blend` needs of them on the device."""

    canvases: tuple[Canvas, ...]
    change: Tensor
    clean: Tensor

    @classmethod
    def of(
        cls, canvases: Sequence[Canvas], latents: PictureLatents, scaling: float, device: Any
    ) -> Placed:
        """latents: of pictures, before the VAE's scaling factor."""
        black = latents.of(np.zeros_like(canvases[0].pixels))
        clean = torch.stack([torch.stack([latents.of(c.pixels), black]) for c in canvases])
        change = torch.stack([canvas.change for canvas in canvases])
        return cls(tuple(canvases), change.to(device), (clean * scaling).to(device))

    def first(self, pairs: int) -> Placed:
        """Of the first pairs of the batch."""
        return Placed(self.canvases[:pairs], self.change[:pairs], self.clean[:pairs])

    def blend(self, noise: Tensor, levels: Sequence[Level]) -> Blend:
        """noise: of the pairs, [B, 2, 4, h, w], standard normal."""
        return Blend(self.change, self.clean, noise, levels)
