"""Pictures: opened in one place, and contact sheets of pairs."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from dualdiff_engine.errors import SettingsError

# larger pictures are refused before they are decoded
MAX_PIXELS = 64_000_000

GAP = 4
CAPTION = 16
# of the mask laid over the image; its outline is drawn in full
OVERLAY = (255, 0, 96)
SHARE = 0.45


def open_picture(picture: Any, name: str, mode: str) -> Image.Image:
    """A path, PIL image or uint8 array as a PIL image of `mode`. Raises SettingsError."""
    if isinstance(picture, str | Path):
        try:
            with Image.open(picture) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise SettingsError(
                        f"{name} {str(picture)!r} has more than {MAX_PIXELS:,} pixels"
                    )
                return opened.convert(mode)
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
            raise SettingsError(f"{name}: {str(picture)!r} is not a readable picture") from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise SettingsError(
                f"{name} array must be uint8 [H, W] or [H, W, 3], "
                f"got {picture.dtype} {list(picture.shape)}"
            )
        return Image.fromarray(picture).convert(mode)
    if isinstance(picture, Image.Image):
        return picture.convert(mode)
    raise SettingsError(f"{name} must be a path, a PIL image or a uint8 array, got {type(picture)}")


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
