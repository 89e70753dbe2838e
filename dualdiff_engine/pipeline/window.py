"""A window of a picture: the rectangle around a region that is drawn at the size of the run.

A small defect in a large picture gets the model's whole resolution. The window has the shape of the
run; what was drawn goes back into the picture at the picture's own resolution, and no pixel outside
of the window is resampled or copied to floats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pipeline.regions import RegionStatistics, sample_region
from dualdiff_engine.settings import WindowRatio

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# (left, top, right, bottom) in pixels, the last two exclusive
Box = tuple[int, int, int, int]

# "auto": the longer side of the region is half of the window's shorter one
AUTO_RATIO = 2.0
# regions are sampled on object masks of at most so many pixels a side
_MOST_SIDE = 2048
# drawn pixels around an outline that count as nearby, and grey levels that two sides differ by
_NEARBY, _CONTRAST = 31, 8


@dataclass(frozen=True)
class Window:
    """A rectangle of a picture, in the picture's pixels."""

    left: int
    top: int
    width: int
    height: int

    @property
    def box(self) -> Box:
        return self.left, self.top, self.left + self.width, self.top + self.height

    @property
    def slices(self) -> tuple[slice, slice]:
        """Rows and columns."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)

    def fitted(self, drawn: Floats) -> Floats:
        """Values [h, w] at the size of the window, [height, width]."""
        shrinks = self.width < drawn.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        return np.asarray(cv2.resize(drawn, (self.width, self.height), interpolation=method))

    def fitted_mask(self, mask: Bytes, found_in: Bytes) -> Bytes:
        """A mask uint8 [h, w] at the size of the window.

        found_in: uint8 [h, w, 3], whose brightness puts the outline between the drawn pixels.
        """
        if mask.shape == (self.height, self.width):
            return mask
        shrinks = self.width < mask.shape[1]
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        depth = _outline(mask, found_in.max(axis=2).astype(np.float32))
        depth = np.asarray(cv2.resize(depth, (self.width, self.height), interpolation=method))
        return np.where(depth > 0, np.uint8(255), np.uint8(0))


def _mixed(known: Bytes, change: Floats, weight: Floats) -> Bytes:
    """Grey levels [height, width] with a share of a change; as they are where the weight is 0."""
    mixed = np.clip(np.round(known + change * weight), 0, 255).astype(np.uint8)
    return np.where(weight > 0, mixed, known)


def _outline(mask: Bytes, brightness: Floats) -> Floats:
    """fp32 [h, w]: above 0 in a mask, 0 on its outline, which is known to less than a pixel.

    There the brightness is halfway between those nearby in the mask and outside, as in
    `extract_mask`. It moves by a pixel at most, and only where the two differ.
    """
    white, size = (mask > 0).astype(np.uint8), (_NEARBY, _NEARBY)
    sides = []
    for part in (white, 1 - white):
        # pixels at the outline are mixed: the deeper inside, the more one counts
        weight = np.minimum(cv2.distanceTransform(part, cv2.DIST_L2, 3), _NEARBY)
        total = np.maximum(cv2.blur(weight, size), 0.5 / _NEARBY**2)
        sides.append(cv2.blur(weight * brightness, size) / total)
    contrast = sides[0] - sides[1]
    depth = (brightness - (sides[0] + sides[1]) / 2) / np.maximum(contrast, _CONTRAST)
    own, kernel = white - np.float32(0.5), np.ones((3, 3), np.uint8)
    rim = (cv2.dilate(white, kernel) > cv2.erode(white, kernel)) & (contrast >= _CONTRAST)
    return np.where(rim, np.clip(depth, -0.5, 0.5), own).astype(np.float32)


@dataclass(frozen=True)
class View:
    """The window of a pair, in its picture.

    picture: RGB, at its own size. region: L, of the same size, 255 inside. scale: pixels of the
    picture per drawn pixel.
    """

    window: Window
    picture: Image.Image
    region: Image.Image
    scale: float

    @property
    def share(self) -> float:
        """Of the picture's pixels, those in the window."""
        return self.window.width * self.window.height / (self.picture.width * self.picture.height)

    def record(self) -> dict[str, Any]:
        """For a recipe: left, top, width, height; and the picture's width and height."""
        window = self.window
        return {
            "box": [window.left, window.top, window.width, window.height],
            "picture": list(self.picture.size),
        }

    def with_drawn(self, drawn: Floats, weight: Floats, *, black: bool) -> Bytes:
        """The picture, or black, with what was drawn in its window: uint8 [H, W, 3].

        drawn: [h, w, 3] in [0, 1]. weight: [height, width] of the window, in [0, 1]; where it is 0,
        pixels stay what they are.
        """
        size = (self.picture.height, self.picture.width, 3)
        whole = np.zeros(size, np.uint8) if black else np.array(self.picture)
        part = whole[self.window.slices]
        for channel, values in self._channels(drawn):
            known = part[..., channel]
            part[..., channel] = _mixed(known, values - known, weight)
        return whole

    def with_change(self, change: Floats, weight: Floats) -> Bytes:
        """The picture with a change [h, w, 3] in [-1, 1] added in its window; weight: as above."""
        whole = np.array(self.picture)
        part = whole[self.window.slices]
        for channel, values in self._channels(change):
            part[..., channel] = _mixed(part[..., channel], values, weight)
        return whole

    def _channels(self, drawn: Floats) -> Iterator[tuple[int, Floats]]:
        """Channels of drawn pixels at the window's size, in grey levels."""
        # a channel at a time: a window may be large
        for channel in range(3):
            yield channel, self.window.fitted(np.ascontiguousarray(drawn[..., channel])) * 255

    def with_mask(self, mask: Bytes) -> Bytes:
        """A mask of the window's size on black, uint8 [H, W]."""
        whole = np.zeros((self.picture.height, self.picture.width), np.uint8)
        whole[self.window.slices] = mask
        return whole


@dataclass(frozen=True)
class Whole:
    """A placement's pictures at their own size: RGB, and masks L of 0 and 255.

    region: None when it is sampled. object_mask: None when it was not needed.
    """

    picture: Image.Image
    region: Image.Image | None
    object_mask: Image.Image | None

    @property
    def nbytes(self) -> int:
        masks = (self.region is not None) + (self.object_mask is not None)
        return self.picture.width * self.picture.height * (3 + masks)

    def view(
        self, region: Image.Image, size: tuple[int, int], ratio: WindowRatio, edge: float
    ) -> View:
        """The window around a region; arguments as for `window_around`."""
        box = region.getbbox()
        assert box is not None, "a region has white pixels"
        window = window_around(box, self.picture.size, size, ratio, edge)
        return View(window, self.picture, region, window.width / size[1])

    def sampled_view(
        self,
        statistics: RegionStatistics,
        seed: int,
        size: tuple[int, int],
        ratio: WindowRatio,
        edge: float,
        step: int,
    ) -> View:
        """The same of a region that is sampled on the object, cut to the window.

        step: drawn pixels per latent pixel. A region under a latent pixel is widened by one.
        """
        view = self.view(self._sampled(statistics, seed, step), size, ratio, edge)
        part = view.region.crop(view.window.box)
        drawn = np.asarray(part.resize((size[1], size[0]), Image.Resampling.BOX)) > 127
        pixels = np.array(part)
        if np.count_nonzero(drawn) < step**2:
            side = 2 * math.ceil(step * view.scale) + 1
            pixels = np.asarray(cv2.dilate(pixels, np.ones((side, side), np.uint8)), np.uint8)
        return replace(view, region=Image.fromarray(view.with_mask(pixels)))

    def _sampled(self, statistics: RegionStatistics, seed: int, step: int) -> Image.Image:
        """Areas are shares of the whole picture, as in the statistics."""
        assert self.object_mask is not None, "regions are sampled on an object"
        ratio = min(_MOST_SIDE / max(self.picture.size), 1.0)
        width, height = (max(round(side * ratio), 1) for side in self.picture.size)
        small = np.asarray(self.object_mask.resize((width, height), Image.Resampling.BOX))
        # a latent pixel of a window that is drawn at the picture's own scale
        least = max(round((ratio * step) ** 2), 9)
        region = Image.fromarray(sample_region(small, statistics, seed, least=least))
        soft = np.asarray(region.resize(self.picture.size, Image.Resampling.BILINEAR))
        return Image.fromarray(np.where(soft > 127, np.uint8(255), np.uint8(0)))


def check_room(name: str, ratio: WindowRatio, size: tuple[int, int], edge: float) -> None:
    """That the soft edge fits between any region and the window's border. Raises SettingsError.

    size: (height, width) of the run. edge: in its pixels.
    """
    room = min(size) - 2 * edge
    where = f"at {size[0]} x {size[1]}"
    if room <= 0:
        raise SettingsError(
            f"{name} edge leaves no room for a region in a window {where}: pass a smaller edge"
        )
    least = min(size) / room
    if ratio != "auto" and ratio < least - 1e-6:
        raise SettingsError(
            f"{name} window {ratio:g} leaves no room for the edge {where}: pass "
            f"{math.ceil(100 * least) / 100:g} or more, or a smaller edge"
        )


def window_around(
    box: Box, picture: tuple[int, int], size: tuple[int, int], ratio: WindowRatio, edge: float
) -> Window:
    """The window around a region's bounding box, as much of it as the picture has.

    Its shorter side is `ratio` times the longer side of the box. "auto": 2 times, or more where the
    edge needs it, and not under the size of the run: a picture is not magnified without need. It is
    centred on the box, then shifted into the picture.

    picture: (width, height). size: (height, width) of the run. edge: in pixels of the run.
    """
    left, top, right, bottom = box
    height, width = size
    scale = min(_scale(box, size, ratio, edge), picture[0] / width, picture[1] / height)
    own_width = max(min(round(scale * width), picture[0]), 1)
    own_height = max(min(round(scale * height), picture[1]), 1)
    return Window(
        min(max((left + right - own_width) // 2, 0), picture[0] - own_width),
        min(max((top + bottom - own_height) // 2, 0), picture[1] - own_height),
        own_width,
        own_height,
    )


def _scale(box: Box, size: tuple[int, int], ratio: WindowRatio, edge: float) -> float:
    """Pixels of the picture per drawn pixel, if the picture is large enough."""
    shorter, longer = min(size), max(box[2] - box[0], box[3] - box[1])
    if ratio != "auto":
        return ratio * longer / shorter
    return max(AUTO_RATIO * longer / shorter, longer / (shorter - 2 * edge), 1.0)


def require_fit(
    name: str, box: Box, picture: tuple[int, int], size: tuple[int, int], ratio: WindowRatio
) -> None:
    """That the picture has a window as large as asked for around a box. Raises SettingsError.

    Sizes as for `window_around`.
    """
    largest = min(picture[0] / size[1], picture[1] / size[0])
    widest, highest = round(largest * size[1]), round(largest * size[0])
    own_width, own_height = box[2] - box[0], box[3] - box[1]
    if own_width > widest or own_height > highest:
        raise SettingsError(
            f"{name} region is {own_width} x {own_height} pixels, larger than any window of its "
            f"picture ({widest} x {highest}): leave out window, or pass a smaller region"
        )
    if ratio == "auto":
        return
    wanted = _scale(box, size, ratio, 0)
    # half a pixel is rounding
    if wanted * size[1] > picture[0] + 0.5 or wanted * size[0] > picture[1] + 0.5:
        most = math.floor(100 * largest * min(size) / max(own_width, own_height)) / 100
        remedy = f"pass at most {most:g}, or 'auto'" if most >= 1 else "pass 'auto'"
        raise SettingsError(
            f"{name} window {ratio:g} is {round(wanted * size[1])} x {round(wanted * size[0])} "
            f"pixels, larger than its picture ({picture[0]} x {picture[1]}): {remedy}"
        )
