"""Pictures: opened in one place for drawing, training and evaluation; contact sheets of pairs.

What viewers show is what counts: depth is scaled and orientation tags are obeyed. What could mean
two things is refused. The table of both is in `training/README.md`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFile, UnidentifiedImageError

from dualdiff_engine.errors import SettingsError

Bytes = NDArray[np.uint8]

# larger pictures are refused before they are decoded; a file holds at most 8 bytes a pixel
MAX_PIXELS = 64_000_000
MAX_BYTES = 8 * MAX_PIXELS
# EPS and others that start programs or have no size are not among them
_FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")

# Pillow's modes
_SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
_DEEP = (*_SIXTEEN, "I", "F")
_ALPHA = ("LA", "PA", "RGBA", "RGBa")
_PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
# tags of EXIF and TIFF
_ORIENTATION, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0112, 0x0106, 0
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# 16 bits -> 8, rounded; what is not quite black stays so, since it could be a label of a mask
_EIGHT_OF_SIXTEEN = ((np.arange(65536) + 128) // 257).astype(np.uint8)
_EIGHT_OF_SIXTEEN[1:129] = 1

# difference of channels that makes a mask coloured
_COLOUR = 32
# levels of a mask that was drawn as labels
_FEW = 32
# of other masks: JPEG leaves noise of this level and parts of so many pixels
# (at quality 20, the largest of 80 random masks had 10)
_NOISE, _SPECK = 32, 16

GAP = 4
CAPTION = 16
# of the mask laid over the image; its outline is drawn in full
OVERLAY = (255, 0, 96)
SHARE = 0.45


def open_picture(picture: Any, name: str, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Open a picture, or a mask, by the rules of `training/README.md`.

    Args:
        picture: path, PIL image, or array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of bool, uint8,
            uint16 (white is 65535) or floats (white is 1). Of several frames the first is taken.
        name: of the picture, for errors.
        mode: RGB for a picture, which has to be opaque. L for a mask: transparent is black, a
            colour counts by its brightest channel, and white is half of full scale or more.

    Returns:
        The picture upright, with 8 bits per channel; a mask holds 0 and 255 alone.

    Raises:
        SettingsError: it cannot be read, has more than 64 million pixels, or its depth, transparent
            pixels (RGB) or grey parts (L) could mean two things.
    """
    if isinstance(picture, str | Path):
        label = f"{picture}: the {name}"
        image = _from_file(Path(picture), label)
    elif isinstance(picture, Image.Image):
        label = name
        with _readable(name):
            image = _decoded(picture, label)
    elif isinstance(picture, np.ndarray):
        label = name
        image = _from_array(picture, label)
    else:
        kind = f"{type(picture).__module__}.{type(picture).__qualname__}"
        raise SettingsError(f"{name} must be a path, a PIL image or a NumPy array, got {kind}")
    return _mask(image, label) if mode == "L" else _opaque(image, label)


def object_mask_fault(mask: Image.Image) -> str | None:
    """Why a mask from `open_picture` cannot be an object's, or None if it can.

    The rule for drawing on a background and for training with one.
    """
    white = np.asarray(mask) > 127
    if not white.any():
        return "has no white pixel: draw the object in white"
    if white.all():
        return "is all white, so no background is left: correct it"
    if white[[0, -1]].all() and white[:, [0, -1]].all():
        return "is white along its whole border: invert it, the object has to be white"
    return None


@contextmanager
def _readable(subject: Any) -> Iterator[None]:
    """Whatever Pillow raises becomes a SettingsError."""
    try:
        yield
    except SettingsError:
        raise
    except Image.DecompressionBombError as error:
        raise SettingsError(_too_large(subject)) from error
    except UnidentifiedImageError as error:
        raise SettingsError(
            f"{subject} is not a readable picture: save it again as PNG with 8 bits"
        ) from error
    # damaged bytes end in SyntaxError, struct.error, zlib.error, KeyError and more
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise SettingsError(
            f"{subject} is not a readable picture ({reason}): save it again"
        ) from error


def _too_large(subject: Any) -> str:
    return f"{subject} has more than {MAX_PIXELS:,} pixels: reduce it"


def _from_file(path: Path, label: str) -> Image.Image:
    with _readable(path):
        # a pipe could be read for ever
        if not path.is_file():
            raise SettingsError(f"{path} is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path} has more than {MAX_BYTES:,} bytes: reduce it")
        with Image.open(path, formats=_FORMATS) as opened:
            return _decoded(opened, label)


def _decoded(image: Image.Image, label: str) -> Image.Image:
    """Upright, of mode L, RGB or RGBA."""
    if image.width * image.height == 0:
        raise SettingsError(f"{label} has no pixels: its size is {image.size}")
    if image.width * image.height > MAX_PIXELS:
        raise SettingsError(_too_large(label))
    # Pillow drops the low bytes of 16-bit colours; only the layout of the file tells
    layout = str([tile.args for tile in getattr(image, "tile", ())])
    cut = ";16" in layout and image.format in ("PNG", "TIFF") and image.mode not in _DEEP
    _load(image)
    # Pillow has turned TIFF by now, and dropped the tag
    tag = image.getexif().get(_ORIENTATION)
    flat = _flat_mode(image, label)
    if cut:
        # at least 1: all high bytes can be 0 though the picture is not black
        _require_top_bit(max(1, int(np.asarray(flat.convert("RGB")).max())), 255, label)
    return flat.transpose(_TURNS[tag]) if isinstance(tag, int) and tag in _TURNS else flat


def _load(image: Image.Image) -> None:
    """Decode the pixels."""
    if not isinstance(image, ImageFile.ImageFile):
        image.load()
        return
    # without a name Pillow maps nothing: mapping a TIFF that has to be turned mixes up its rows
    name, image.filename = image.filename, ""
    try:
        image.load()
    finally:
        image.filename = name


def _flat_mode(image: Image.Image, label: str) -> Image.Image:
    """Of mode L, RGB or RGBA."""
    mode = image.mode
    if mode in _DEEP:
        if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            raise SettingsError(f"{label} has white as 0 (mode {mode}): invert it")
        levels = np.asarray(image)
        # Pillow reads 16-bit PNM this way, and older ones 16-bit PNG
        if mode == "I" and image.format in ("PNG", "PPM"):
            levels = levels.astype(np.uint16)
        return _from_array(levels, f"{label} of mode {mode}")
    if mode in _ALPHA or (mode in _PLAIN and "transparency" in image.info):
        return image.convert("RGBA")
    if mode in ("1", "L"):
        return image.convert("L")
    if mode in _PLAIN:
        return image.convert("RGB")
    raise SettingsError(f"{label} has mode {mode}: convert it to RGB")


def _from_array(array: NDArray[Any], label: str) -> Image.Image:
    """Of mode L, RGB or RGBA."""
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or array.size == 0:
        raise SettingsError(
            f"{label} array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], channels last, "
            f"got {list(array.shape)}"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise SettingsError(_too_large(label))
    pixels = _bytes(np.asarray(array), label)
    pixels = pixels[..., 0] if pixels.ndim == 3 and channels == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels))


def _bytes(array: NDArray[Any], label: str) -> Bytes:
    """0 … 255 of what the dtype takes for black … white."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return np.where(array, np.uint8(255), np.uint8(0))
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        colours = array[..., :3] if array.ndim == 3 else array
        _require_top_bit(int(colours.max()), 65535, label)
        return _EIGHT_OF_SIXTEEN[array]
    if array.dtype.kind != "f":
        raise SettingsError(
            f"{label} holds {array.dtype}, whose white is not known: "
            "use uint8 (white is 255), uint16 (65535) or floats (1)"
        )
    if not np.isfinite(array).all():
        raise SettingsError(f"{label} holds NaN or infinity: correct it")
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise SettingsError(
            f"{label} holds floats from {low:g} to {high:g}: scale them to 0 … 1, or use uint8"
        )
    return np.floor(array.astype(np.float32) * 255 + 0.5).astype(np.uint8)


def _require_top_bit(peak: int, white: int, label: str) -> None:
    """Cameras store 10, 12 or 14 bits in 16, which would read as nearly black."""
    if 0 < peak <= white // 2:
        raise SettingsError(
            f"{label} has 16 bits and is nowhere brighter than {peak} of {white}: stretch it to "
            "the full range if it holds fewer bits, or save it with 8"
        )


def _opaque(image: Image.Image, label: str) -> Image.Image:
    if image.mode == "RGBA" and (np.asarray(image)[..., 3] < 255).any():
        raise SettingsError(f"{label} has transparent pixels: flatten it to RGB")
    return image.convert("RGB")


def _mask(image: Image.Image, label: str) -> Image.Image:
    """Of mode L, with 0 and 255 alone."""
    levels = _levels(image, label)
    fault = _unclear(levels)
    if fault:
        raise SettingsError(f"{label} {fault}")
    return Image.fromarray(np.where(levels > 127, np.uint8(255), np.uint8(0)))


def _levels(image: Image.Image, label: str) -> Bytes:
    """Grey of a mask, uint8 [H, W]; in colours, the brightest channel."""
    if image.mode == "L":
        return np.asarray(image)
    red, green, blue, *alpha = cv2.split(np.asarray(image))
    brightest = cv2.max(cv2.max(red, green), blue)
    if alpha and (alpha[0] < 255).any():
        drawn = brightest[alpha[0] > 127]
        if not drawn.any() or ((drawn > 0) & (drawn < 128)).any():
            raise SettingsError(
                f"{label} holds marks in its alpha channel that are not white: "
                "save it without one, white on black"
            )
        return np.asarray(cv2.multiply(brightest, alpha[0], scale=1 / 255), np.uint8)
    darkest = cv2.min(cv2.min(red, green), blue)
    if (cv2.subtract(brightest, darkest) <= _COLOUR).all():
        return np.asarray(image.convert("L"))
    if (brightest > _NOISE).all():
        raise SettingsError(f"{label} is coloured and has no black: draw the defect on black")
    return np.asarray(brightest, np.uint8)


def _unclear(levels: Bytes) -> str | None:
    """Which part of a mask would be lost, if any. Soft edges of white parts are none."""
    present = cv2.calcHist([levels], [0], None, [256], [0, 256]).ravel() > 0
    if not present[1:255].any():
        return None
    if not present[128:].any():
        return f"has no white pixel (brightest value {levels.max()}: save white as 255)"
    # where levels are few and white is exact, each is meant; else JPEG or blur left noise
    exact = present.sum() <= _FEW and not present[224:255].any()
    floor, smallest = (0, 1) if exact else (_NOISE, _SPECK)
    _, parts, stats, _ = cv2.connectedComponentsWithStats((levels > floor).astype(np.uint8))
    lost = stats[:, cv2.CC_STAT_AREA] >= smallest
    lost[parts[levels > 127]] = lost[0] = False
    if lost.any():
        part = levels[parts == int(lost.argmax())]
        return (
            f"has a part of {part.size} pixels without white (brightest value {part.max()}): "
            "save every defect as 255, and the rest as 0"
        )
    kernel = np.ones((3, 3) if exact else (5, 5), np.uint8)
    even = (cv2.erode(levels, kernel) == cv2.dilate(levels, kernel)) & (levels > floor)
    even &= levels < 128
    if even.any():
        return (
            f"has an area of grey {levels[even][0]} next to white: "
            "save every defect as 255, and the rest as 0"
        )
    return None


_PNG = b"\x89PNG\r\n\x1a\n"
# of a chunk: more is not read, whatever its length field says
_MOST_CHUNK = 1 << 28


def is_whole_png(path: Path) -> bool:
    """Whether a PNG is there, ends where it says, and every chunk has its checksum.

    Source: https://www.w3.org/TR/png-3/, chunk layout.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(_PNG)) != _PNG:
                return False
            while len(head := file.read(8)) == 8:
                length, kind = int.from_bytes(head[:4], "big"), head[4:]
                body = file.read(min(length, _MOST_CHUNK))
                checksum = int.from_bytes(file.read(4), "big")
                if len(body) != length or zlib.crc32(kind + body) != checksum:
                    return False
                if kind == b"IEND":
                    return True
    except OSError:
        return False
    return False


def overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image in RGB with the mask's pixels tinted and outlined."""
    pixels, inside = np.array(image.convert("RGB")), np.asarray(mask.convert("L")) > 127
    tint = np.array(OVERLAY, np.float32)
    pixels[inside] = np.round(pixels[inside] * (1 - SHARE) + SHARE * tint).astype(np.uint8)
    kernel = np.ones((3, 3), np.uint8)
    rim = cv2.dilate(inside.astype(np.uint8), kernel) > inside
    pixels[rim] = OVERLAY
    return Image.fromarray(pixels)


def grid(columns: Sequence[Sequence[Image.Image]], captions: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size, a list per column; captions, if any, stand above the columns."""
    width, height = columns[0][0].size
    top = CAPTION if captions else 0
    rows = len(columns[0])
    size = len(columns) * (width + GAP) - GAP, top + rows * (height + GAP) - GAP
    whole = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(whole)
    for column, pictures in enumerate(columns):
        left = column * (width + GAP)
        if captions:
            pen.text((left + 2, 2), captions[column], fill="black")
        for row, picture in enumerate(pictures):
            whole.paste(picture.convert("RGB"), (left, top + row * (height + GAP)))
    return whole


def stacked(parts: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    size = max(p.width for p in parts), sum(p.height + 2 * GAP for p in parts) - 2 * GAP
    whole, top = Image.new("RGB", size, "white"), 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height + 2 * GAP
    return whole
