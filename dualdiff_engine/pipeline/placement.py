"""What a pair is drawn on: the normal picture, the region of the defect, and its soft edge.

A `Placement` is opened and checked before anything is computed; `blend` keeps the latents outside
the region at every step, and `Canvas.paste` puts the picture's own pixels back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from dualdiff_engine.pipeline.window import View, Whole, check_room, require_fit
from dualdiff_engine.settings import Background, Placement, WindowRatio

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]

# in latent pixels: the decoder knows where a mask ends to less than one
MASK_EDGE = 0.5
# placements whose opened pictures are kept: pairs of one batch often share them
_MOST_OPEN = 8
# those of windows are kept at their own size
_MOST_BYTES = 256 << 20
# an object is looked for at no more pixels a side
_MOST_SIDE = 1024


@dataclass(frozen=True)
class Opened:
    """A placement's pictures at the size of a run: uint8 [H, W, 3] and bool [H, W].

    region: None when it is sampled. object_mask: None when it was not needed. view: of what they
    are a window.
    """

    picture: NDArray[np.uint8]
    region: Flags | None
    object_mask: Flags | None
    view: View | None = None

    @property
    def nbytes(self) -> int:
        return 2 * self.picture.nbytes

    def surroundings(self) -> NDArray[np.uint8]:
        """The picture with the object black, uint8 [H, W, 3], as a background is cut."""
        assert self.object_mask is not None, "opened with need_object"
        return np.where(self.object_mask[..., None], np.uint8(0), self.picture)


@dataclass(frozen=True)
class Canvas:
    """What one pair is drawn on.

    picture: fp32 [3, H, W] in [0, 1], the normal picture. region: bool [H, W]. weight: fp32 [H, W],
    1 in the region, falling to 0 over the edge around it. change: fp32 [h, w], its mean over each
    latent pixel. step: pixels per latent pixel. view: the window that the picture is, if any.
    """

    placement: Placement
    pixels: NDArray[np.uint8]
    region: Flags
    weight: Tensor
    change: Tensor
    step: int
    view: View | None

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

    def paste(self, image: Tensor, anomaly: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """The drawn pictures [3, H, W] in the region, the normal one and black outside the edge.

        normal: the normal picture as the VAE rebuilds it.
        """
        if self.placement.paste == "none":
            return image, anomaly
        if self.placement.paste == "difference":
            # what the decoder does to all pictures cancels
            image = (self.picture + self.weight * (image - normal)).clamp(0, 1)
            return image, anomaly * self.weight
        return self._pasted(image, anomaly, self.weight)

    def paste_mask(self, mask: Bytes, image: Tensor, anomaly: Tensor) -> tuple[Tensor, Tensor]:
        """The same in a mask, uint8 [H, W], where that is asked for; its edge is half a latent."""
        if self.placement.paste != "mask":
            return image, anomaly
        weight = edge_weight(mask > 0, MASK_EDGE * self.step)
        return self._pasted(image, anomaly, torch.from_numpy(weight))

    def whole(
        self, image: Tensor, anomaly: Tensor, normal: Tensor, mask: Bytes, found_in: Bytes
    ) -> tuple[Bytes, Bytes, Bytes]:
        """What was drawn in a window [3, H, W], and its mask, in pictures of the placement's size.

        Nothing is pasted yet: that is done here, at the picture's own resolution. normal: as for
        `paste`. found_in: what the mask was found in, uint8 [H, W, 3].
        """
        view, paste = self.view, self.placement.paste
        assert view is not None, "a canvas of a window"
        mask = view.window.fitted_mask(mask, found_in)
        weight = np.ones(mask.shape, np.float32)
        if paste != "none":
            region = np.asarray(view.region.crop(view.window.box)) > 0
            weight = edge_weight(region, self.placement.edge * self.step * view.scale)
            mask = np.where(weight > 0, mask, np.uint8(0))
        if paste == "mask":
            weight = weight * edge_weight(mask > 0, MASK_EDGE * self.step * view.scale)
        pixels = image.permute(1, 2, 0).numpy()
        if paste == "difference":
            shown = view.with_change(pixels - normal.permute(1, 2, 0).numpy(), weight)
        else:
            shown = view.with_drawn(pixels, weight, black=False)
        return (
            shown,
            view.with_drawn(anomaly.permute(1, 2, 0).numpy(), weight, black=True),
            view.with_mask(mask),
        )

    def _pasted(self, image: Tensor, anomaly: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        # where the weight is 0, lerp gives its first argument bit for bit
        return torch.lerp(self.picture, image, weight), anomaly * weight


class Canvases:
    """The canvases of a run: every placement is checked once, and opened again for its batches.

    placements: one per pair, or one for all. size: (height, width) in pixels; step: pixels per
    latent pixel. need_object: whether the background is made of the pictures. auto: the ratio that
    the adapter was trained with, for windows that are "auto". Raises SettingsError for the first
    placement that cannot be used.
    """

    def __init__(
        self,
        placements: Sequence[Placement],
        size: tuple[int, int],
        step: int,
        *,
        need_object: bool,
        auto: float | None = None,
    ) -> None:
        self._placements, self._size, self._step = tuple(placements), size, step
        self._need_object, self._auto = need_object, auto
        self._open: OrderedDict[int, Opened | Whole] = OrderedDict()
        self._known: dict[int, dict[str, Any]] = {}
        for index, placement in enumerate(self._placements):
            if placement.window is not None:
                check_room(self._name(index), placement.window, size, placement.edge * step)
            self._opened(index)
        self.records = [self._known[id(placement)] for placement in self._placements]

    def place(self, pair: int) -> int:
        """Index of a pair's placement and record."""
        return pair if len(self._placements) > 1 else 0

    def canvas(self, pair: int, seed: int) -> Canvas:
        """Of a pair, by its number in the request and its seed. Raises SettingsError."""
        placement = self._placements[self.place(pair)]
        opened = self._drawn_on(self.place(pair), seed)
        region = opened.region
        assert region is not None, "drawn or sampled"
        weight = edge_weight(region, placement.edge * self._step)
        return Canvas(
            placement,
            opened.picture,
            region,
            torch.from_numpy(weight),
            torch.from_numpy(pooled(weight, self._step)),
            self._step,
            opened.view,
        )

    def _drawn_on(self, index: int, seed: int) -> Opened:
        """What a pair is drawn on, with its region: the picture, or its window."""
        opened, placement, step = self._opened(index), self._placements[index], self._step
        statistics = placement.region
        if isinstance(opened, Opened):
            if not isinstance(statistics, RegionStatistics):
                return opened
            assert opened.object_mask is not None
            drawn = sample_region(opened.object_mask, statistics, seed, least=step**2)
            return replace(opened, region=drawn > 0)
        assert placement.window is not None
        around = self._size, self._ratio(placement), placement.edge * step
        if isinstance(statistics, RegionStatistics):
            view = opened.sampled_view(statistics, seed, *around, step)
        else:
            assert opened.region is not None
            view = opened.view(opened.region, *around)
        return _cut(opened, view, self._size)

    def backgrounds(self, noise: Tensor | None) -> tuple[Surroundings, ...]:
        """The pictures without their objects as backgrounds: one per pair, or one for all.

        noise: that replaces the background's draws. Where a window follows from a pair's seed, its
        background does too: there are no pixels then, but those of `surroundings`.
        """
        return tuple(
            Surroundings(record_of(Background(None), None, noise), None)
            if placement.window is not None and isinstance(placement.region, RegionStatistics)
            else self._surroundings(index, 0, noise)
            for index, placement in enumerate(self._placements)
        )

    def surroundings(self, pair: int, seed: int, noise: Tensor | None) -> Surroundings:
        """The background of one pair, as `canvas` and `backgrounds`."""
        return self._surroundings(self.place(pair), seed, noise)

    def _surroundings(self, index: int, seed: int, noise: Tensor | None) -> Surroundings:
        pixels = self._drawn_on(index, seed).surroundings()
        return Surroundings(
            record_of(Background(None), pixels, noise),
            lambda: self._drawn_on(index, seed).surroundings(),
        )

    def _name(self, index: int) -> str:
        return f"placement {index}" if len(self._placements) > 1 else "placement"

    def _opened(self, index: int) -> Opened | Whole:
        """One of the last ones, or opened again and compared with the first time."""
        placement, name = self._placements[index], self._name(index)
        # by identity: the placements are held as long as this object
        key = id(placement)
        if key not in self._open:
            need_object = self._need_object or isinstance(placement.region, RegionStatistics)
            fresh: Opened | Whole
            if placement.window is None:
                fresh = opened(placement, name, self._size, self._step, need_object)
            else:
                fresh = self._whole(placement, name, need_object)
            window = None if placement.window is None else self._ratio(placement)
            record = _record(placement, fresh, window)
            if self._known.setdefault(key, record) != record:
                raise SettingsError(
                    f"{name} changed since the run began: leave its files as they are"
                )
            self._open[key] = fresh
        self._open.move_to_end(key)
        while len(self._open) > 1 and (
            len(self._open) > _MOST_OPEN
            or sum(each.nbytes for each in self._open.values()) > _MOST_BYTES
        ):
            self._open.popitem(last=False)
        return self._open[key]

    def _ratio(self, placement: Placement) -> WindowRatio:
        """Of a window: "auto" is that of the adapter's training, if it was one of windows."""
        assert placement.window is not None
        if placement.window != "auto" or self._auto is None:
            return placement.window
        shorter = min(self._size)
        return max(self._auto, shorter / (shorter - 2 * placement.edge * self._step))

    def _whole(self, placement: Placement, name: str, need_object: bool) -> Whole:
        """Of a placement with a window, which is checked too. Raises SettingsError."""
        whole, ratio = opened_whole(placement, name, need_object), placement.window
        assert ratio is not None
        if whole.region is not None:
            box = whole.region.getbbox()
            assert box is not None, "the region was checked"
            require_fit(name, box, whole.picture.size, self._size, ratio)
            edge = placement.edge * self._step
            view = whole.view(whole.region, self._size, self._ratio(placement), edge)
            drawn = _cut(whole, view, self._size)
            assert drawn.region is not None
            _require_on_object(name, drawn.region, drawn.object_mask)
            _require_a_latent(name, drawn.region, self._step)
        return whole


def _record(
    placement: Placement, opened: Opened | Whole, window: WindowRatio | None
) -> dict[str, Any]:
    """The placement's part of a recipe."""
    pictures = {
        "picture": opened.picture,
        "region": opened.region,
        "object_mask": opened.object_mask,
    }
    sampled = placement.region if isinstance(placement.region, RegionStatistics) else None
    return {
        **{
            f"{name}_sha256": None if x is None else digest(np.asarray(x))
            for name, x in pictures.items()
        },
        "statistics": sampled.record() if sampled else None,
        "edge": placement.edge,
        "paste": placement.paste,
        # recipes of whole pictures are those of older versions
        **({} if window is None else {"window": window}),
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
        region = _shrunk(_region(placement, name, picture), (width, height))
        _require_a_latent(name, region, step)
        _require_on_object(name, region, object_mask)
    return Opened(pixels, region, object_mask)


def opened_whole(placement: Placement, name: str, need_object: bool) -> Whole:
    """A placement's pictures at their own size. Raises SettingsError when they cannot be used."""
    picture = open_picture(placement.picture, f"{name} picture", "RGB")
    ratio = min(_MOST_SIDE / max(picture.size), 1.0)
    size = max(round(picture.width * ratio), 1), max(round(picture.height * ratio), 1)
    small = np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
    flags = _object_mask(placement, name, picture, picture.size, small, need_object)
    object_mask = None
    if flags is not None:
        levels = Image.fromarray(np.where(flags, np.uint8(255), np.uint8(0)))
        object_mask = levels.resize(picture.size, Image.Resampling.NEAREST)
    sampled = isinstance(placement.region, RegionStatistics)
    region = None if sampled else _region(placement, name, picture)
    return Whole(picture, region, object_mask)


def _cut(whole: Whole, view: View, size: tuple[int, int]) -> Opened:
    """The window of a view at the size of a run, (height, width)."""
    box, shape = view.window.box, (size[1], size[0])
    pixels = np.array(view.picture.crop(box).resize(shape, Image.Resampling.BICUBIC))
    object_mask = None
    if whole.object_mask is not None:
        object_mask = _shrunk(whole.object_mask.crop(box), shape)
    return Opened(pixels, _shrunk(view.region.crop(box), shape), object_mask, view)


def _require_same_size(name: str, mask: Image.Image, picture: Image.Image) -> None:
    if mask.size != picture.size:
        raise SettingsError(f"{name} is {mask.size}, its picture {picture.size}: they must match")


def _shrunk(mask: Image.Image, size: tuple[int, int]) -> Flags:
    """A mask of 0 and 255 at another size (width, height): white where half of a pixel is."""
    return np.asarray(mask.resize(size, Image.Resampling.BOX)) > 127


def _region(placement: Placement, name: str, picture: Image.Image) -> Image.Image:
    """The drawn region, of the picture's size."""
    mask = open_picture(placement.region, f"{name} region", "L")
    _require_same_size(f"{name} region", mask, picture)
    low, high = mask.getextrema()
    if high == 0:
        raise SettingsError(
            f"{name} region has no white pixel: draw the place of the defect in white"
        )
    if low == 255:
        raise SettingsError(
            f"{name} region is all white, so nothing of the picture is kept: draw a smaller one"
        )
    return mask


def _require_a_latent(name: str, region: Flags, step: int) -> None:
    if np.count_nonzero(region) < step**2:
        height, width = region.shape
        raise SettingsError(
            f"{name} region is smaller than a latent pixel ({step} x {step} pixels) at "
            f"{height} x {width}: draw a larger one, or pass a larger size"
        )


def _require_on_object(name: str, region: Flags, object_mask: Flags | None) -> None:
    if object_mask is not None and not (region & object_mask).any():
        raise SettingsError(f"{name} region lies off the object: move it onto the object mask")


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
