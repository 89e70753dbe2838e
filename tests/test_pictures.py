"""What people feed as pictures and masks: read as it shows, or refused with a remedy."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pictures import MAX_PIXELS, open_picture
from hostile_pictures import (
    BOMB,
    COLOUR,
    DEEP,
    HEIGHT,
    RAMP,
    WHITE,
    WIDTH,
    chunk,
    claiming,
    with_tag,
)

MASK = np.zeros((HEIGHT, WIDTH), np.uint8)
MASK[8:20, 10:24] = 255
BELOW = np.zeros_like(MASK)
BELOW[30:40, 10:24] = 255
BLACK = np.zeros_like(MASK)

Make = Callable[[Path], Any]


def written(path: Path, pixels: np.ndarray) -> Path:
    """By OpenCV, which keeps 16 bits and floats; its channels are BGR."""
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.ndim == 3 else None
    assert cv2.imwrite(str(path), pixels if order is None else pixels[..., order])
    return path


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def stored(image: Image.Image, form: str, **options: Any) -> Image.Image:
    """As `Image.open` gives it: nothing decoded yet."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return Image.open(file)


def paletted(colours: list[int], labels: np.ndarray) -> Image.Image:
    image = Image.fromarray(labels.astype(np.uint8), "L")
    image.putpalette(colours)
    return image


def opened(source: Any, mode: Any = "RGB") -> np.ndarray:
    return np.asarray(open_picture(source, "picture" if mode == "RGB" else "mask", mode))


# --- pictures ---------------------------------------------------------------------------------

GREY = np.repeat(RAMP[..., None], 3, 2)
SHOWN: dict[str, tuple[Make, np.ndarray, int]] = {
    "8-bit grey PNG": (lambda p: written(p / "a.png", RAMP), GREY, 0),
    "8-bit colour PNG": (lambda p: written(p / "a.png", COLOUR), COLOUR, 0),
    "16-bit grey PNG": (lambda p: written(p / "a.png", DEEP), GREY, 0),
    "16-bit colour PNG": (
        lambda p: written(p / "a.png", COLOUR.astype(np.uint16) * 257),
        COLOUR,
        0,
    ),
    "16-bit opaque RGBA PNG": (
        lambda p: written(p / "a.png", np.dstack([COLOUR, WHITE]).astype(np.uint16) * 257),
        COLOUR,
        0,
    ),
    "16-bit grey TIFF": (lambda p: written(p / "a.tif", DEEP), GREY, 0),
    "16-bit colour TIFF": (
        lambda p: written(p / "a.tif", COLOUR.astype(np.uint16) * 257),
        COLOUR,
        0,
    ),
    "16-bit PGM": (lambda p: written(p / "a.pgm", DEEP), GREY, 0),
    "float TIFF in 0..1": (lambda p: written(p / "a.tif", RAMP.astype(np.float32) / 255), GREY, 0),
    "PIL image of mode I;16": (lambda p: Image.fromarray(DEEP), GREY, 0),
    "PIL image of mode I;16B": (
        lambda p: Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()),
        GREY,
        0,
    ),
    "PIL image of mode F in 0..1": (lambda p: Image.fromarray(RAMP.astype("f") / 255), GREY, 0),
    "grey with an opaque alpha channel": (
        lambda p: Image.merge("LA", (Image.fromarray(RAMP), Image.fromarray(WHITE))),
        GREY,
        0,
    ),
    "palette": (
        lambda p: saved(
            p / "a.png", paletted([v for n in range(256) for v in (n, n // 2, 255 - n)], RAMP)
        ),
        COLOUR,
        0,
    ),
    "palette whose transparent colour is not used": (
        lambda p: saved(
            p / "a.png", paletted([v for n in range(256) for v in (n,) * 3], RAMP), transparency=0
        ),
        GREY,
        0,
    ),
    "CMYK JPEG": (
        lambda p: saved(
            p / "a.jpg", Image.fromarray(COLOUR).convert("CMYK"), quality=98, subsampling=0
        ),
        COLOUR,
        6,
    ),
    "1-bit PNG": (
        lambda p: saved(p / "a.png", Image.fromarray(MASK).convert("1")),
        np.repeat(MASK[..., None], 3, 2),
        0,
    ),
    "array [H, W, 1]": (lambda p: RAMP[..., None], GREY, 0),
    "array [H, W]": (lambda p: RAMP, GREY, 0),
    "array [H, W, 4], opaque": (lambda p: np.dstack([COLOUR, WHITE]), COLOUR, 0),
    "array of uint16": (lambda p: COLOUR.astype(np.uint16) * 257, COLOUR, 0),
    "big-endian array of uint16": (lambda p: DEEP.astype(">u2"), GREY, 0),
    "array of float16": (lambda p: (COLOUR / 255).astype(np.float16), COLOUR, 0),
    "array of float64": (lambda p: COLOUR / 255, COLOUR, 0),
    "array of bool": (lambda p: MASK > 0, np.repeat(MASK[..., None], 3, 2), 0),
    "view that runs backwards": (lambda p: COLOUR[:, ::-1][:, ::-1], COLOUR, 0),
}


@pytest.mark.parametrize("case", SHOWN)
def test_pictures_are_read_as_they_show(case: str, tmp_path: Path) -> None:
    make, expected, off = SHOWN[case]
    pixels = opened(make(tmp_path))
    assert pixels.dtype == np.uint8
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= off


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photos_and_masks_turn_by_their_own_tags(
    tag: int, suffix: str, mode: str, tmp_path: Path
) -> None:
    turn = Image.Transpose
    undo: dict[int, list[Image.Transpose]] = {
        1: [],
        2: [turn.FLIP_LEFT_RIGHT],
        3: [turn.ROTATE_180],
        4: [turn.FLIP_TOP_BOTTOM],
        5: [turn.TRANSPOSE],
        6: [turn.ROTATE_90],
        7: [turn.TRANSVERSE],
        8: [turn.ROTATE_270],
    }
    shown = Image.fromarray(COLOUR if mode == "RGB" else MASK)
    raw = shown
    for step in undo[tag]:
        raw = raw.transpose(step)
    path = tmp_path / f"photo{suffix}"
    options = {"quality": 98, "subsampling": 0} if suffix == ".jpg" else {}
    raw.save(path, exif=with_tag(tag), **options)
    for source in (path, Image.open(path)):
        pixels = opened(source, mode)
        assert np.abs(pixels.astype(int) - np.asarray(shown)).max() <= 12
    if mode == "L":
        assert np.array_equal(pixels, MASK)


REFUSED: dict[str, tuple[Make, str]] = {
    "12 bits in 16": (
        lambda p: written(p / "a.png", RAMP.astype(np.uint16) * 16),
        r"a\.png: the picture of mode I;16 has 16 bits and is nowhere brighter than 2656 of 65535",
    ),
    "14 bits in a 16-bit colour TIFF": (
        lambda p: written(p / "a.tif", RAMP[..., None].repeat(3, 2).astype(np.uint16) * 64),
        "has 16 bits and is nowhere brighter than 41 of 255: stretch it",
    ),
    "8 bits in uint16": (lambda p: COLOUR.astype(np.uint16), "nowhere brighter than 215 of 65535"),
    "signed 16-bit TIFF": (
        lambda p: written(p / "a.tif", RAMP.astype(np.int16) * 100),
        "a.tif: the picture of mode I holds int32, whose white is not known: use uint8",
    ),
    "int32 TIFF": (lambda p: written(p / "a.tif", RAMP.astype(np.int32)), "mode I holds int32"),
    "array of int64": (lambda p: COLOUR.astype(int), "picture holds int64, whose white is not"),
    "array of int8": (lambda p: COLOUR.astype(np.int8), "picture holds int8"),
    "array of complex numbers": (lambda p: COLOUR.astype(complex), "picture holds complex128"),
    "array of objects": (lambda p: COLOUR.astype(object), "picture holds object"),
    "float TIFF in 0..255": (
        lambda p: written(p / "a.tif", RAMP.astype(np.float32)),
        r"mode F holds floats from 40 to 166: scale them to 0 … 1",
    ),
    "normalised floats": (lambda p: COLOUR / 127.5 - 1, "holds floats from -0.84.* to 0.68.*: sca"),
    "NaN": (lambda p: np.full((4, 4), np.nan, np.float32), "holds NaN or infinity"),
    "infinity": (lambda p: np.full((4, 4), np.inf), "holds NaN or infinity"),
    "channels first": (lambda p: COLOUR.transpose(2, 0, 1), r"channels last, got \[3, 48, 64\]"),
    "two channels": (lambda p: COLOUR[..., :2], r"array must be \[H, W\].*got \[48, 64, 2\]"),
    "a batch": (lambda p: COLOUR[None], r"got \[1, 48, 64, 3\]"),
    "a line": (lambda p: RAMP[0], r"got \[64\]"),
    "a number": (lambda p: np.array(5, np.uint8), r"got \[\]"),
    "no rows": (lambda p: COLOUR[:0], r"got \[0, 64, 3\]"),
    "a tensor": (lambda p: torch.from_numpy(COLOUR), "NumPy array, got torch.Tensor"),
    "bytes": (lambda p: COLOUR.tobytes(), "must be a path, .* got builtins.bytes"),
    "None": (lambda p: None, "must be a path, .* got builtins.NoneType"),
    "partly transparent": (
        lambda p: saved(p / "a.png", Image.fromarray(np.dstack([COLOUR, MASK]))),
        r"a\.png: the picture has transparent pixels: flatten it",
    ),
    "a transparent palette colour": (
        lambda p: saved(p / "a.gif", paletted([0] * 768, MASK), transparency=255),
        "has transparent pixels",
    ),
    "a transparent grey": (
        lambda p: saved(p / "a.png", Image.fromarray(RAMP), transparency=60),
        "has transparent pixels",
    ),
    "a pre-multiplied mode": (lambda p: Image.new("La", (4, 4)), "mode La: convert it to RGB"),
    "16-bit TIFF whose white is zero": (
        lambda p: saved(p / "a.tif", Image.fromarray(DEEP), tiffinfo={262: 0}),
        r"has white as 0 \(mode I;16\): invert it",
    ),
    "a PIL image without rows": (lambda p: Image.new("L", (5, 0)), "picture has no pixels"),
    "a folder": (lambda p: p, "is not a file"),
    "nothing": (lambda p: p / "none.png", r"none\.png is not a file"),
    "a text": (lambda p: _text(p / "a.png"), r"a\.png is not a readable picture: save it again"),
    "PostScript": (
        lambda p: saved(p / "a.png", Image.fromarray(COLOUR), format="EPS"),
        "is not a readable picture: save it again",
    ),
    "a name with a zero byte": (lambda p: "a\0.png", "is not a file"),
    "a name that is too long": (lambda p: p / ("a" * 5000), "is not a readable picture"),
    "too many pixels": (
        lambda p: _bytes(p / "a.png", claiming(MAX_PIXELS + 1, 1)),
        "has more than 64,000,000 pixels: reduce it",
    ),
    "a bomb of pixels": (
        lambda p: _bytes(p / "a.png", claiming(100_000, 100_000)),
        "has more than 64,000,000 pixels: reduce it",
    ),
    "a closed image": (lambda p: _closed(p / "a.png"), "picture is not a readable picture"),
}


def _bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _text(path: Path) -> Path:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    return path


def _closed(path: Path) -> Image.Image:
    with Image.open(saved(path, Image.fromarray(COLOUR))) as image:
        return image


@pytest.mark.parametrize("case", REFUSED)
def test_unclear_pictures_are_refused_by_name(case: str, tmp_path: Path) -> None:
    make, match = REFUSED[case]
    source = make(tmp_path)
    with pytest.raises(SettingsError, match=match) as refused:
        opened(source)
    assert "\n" not in str(refused.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(SettingsError, match=r"a\.png is not a file"):
        opened(tmp_path / "a.png")


# --- masks ------------------------------------------------------------------------------------


def two(one: tuple[int, ...], other: tuple[int, ...], ground: tuple[int, ...] = ()) -> np.ndarray:
    """Two marks on a ground, [H, W, channels]."""
    pixels = np.zeros((HEIGHT, WIDTH, len(one)), np.uint8) + np.array(ground or [0], np.uint8)
    pixels[MASK > 0], pixels[BELOW > 0] = one, other
    return pixels


BOTH = MASK | BELOW
SOFT = cv2.GaussianBlur(MASK, (0, 0), 3)
OUTLINE = np.where(SOFT > 127, np.uint8(255), np.uint8(0))
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * 759
MARKED: dict[str, tuple[Make, np.ndarray]] = {
    "8 bits": (lambda p: written(p / "a.png", MASK), MASK),
    "16 bits": (lambda p: written(p / "a.png", MASK.astype(np.uint16) * 257), MASK),
    "soft edges": (lambda p: written(p / "a.png", SOFT), OUTLINE),
    "soft edges in 16 bits": (
        lambda p: written(p / "a.png", SOFT.astype(np.uint16) * 257),
        OUTLINE,
    ),
    "soft edges as floats": (lambda p: SOFT / 255, OUTLINE),
    "1 bit": (lambda p: saved(p / "a.png", Image.fromarray(MASK).convert("1")), MASK),
    "bool": (lambda p: MASK > 0, MASK),
    "floats of 0 and 1": (lambda p: MASK / 255, MASK),
    "[H, W, 1]": (lambda p: MASK[..., None], MASK),
    "JPEG": (lambda p: saved(p / "a.jpg", Image.fromarray(MASK), quality=60), MASK),
    "colour JPEG": (
        lambda p: saved(p / "a.jpg", Image.fromarray(two((255,) * 3, (255,) * 3)), quality=60),
        BOTH,
    ),
    "red and green": (
        lambda p: saved(p / "a.png", Image.fromarray(two((255, 0, 0), (0, 255, 0)))),
        BOTH,
    ),
    "white and blue": (lambda p: two((255, 255, 255), (0, 0, 255)), BOTH),
    "red and green, JPEG": (
        lambda p: saved(p / "a.jpg", Image.fromarray(two((255, 0, 0), (0, 255, 0))), quality=90),
        BOTH,
    ),
    "VOC's palette": (
        lambda p: saved(p / "a.png", paletted(VOC, MASK // 255 + BELOW // 255 * 2)),
        BOTH,
    ),
    "levels 160 and 240": (lambda p: two((160,), (240,))[..., 0], BOTH),
    "RGBA, opaque": (lambda p: np.dstack([MASK, MASK, MASK, WHITE]), MASK),
    "alpha, white below": (lambda p: np.dstack([WHITE, WHITE, WHITE, MASK]), MASK),
    "alpha, red below": (lambda p: np.dstack([WHITE, BLACK, BLACK, MASK]), MASK),
    "painted on a transparent layer": (lambda p: np.dstack([MASK, MASK, MASK, MASK]), MASK),
    "16-bit alpha, white below": (
        lambda p: written(p / "a.png", np.dstack([WHITE] * 3 + [MASK]).astype(np.uint16) * 257),
        MASK,
    ),
    "grey and alpha": (
        lambda p: stored(Image.merge("LA", [Image.fromarray(x) for x in (WHITE, MASK)]), "PNG"),
        MASK,
    ),
    "empty": (lambda p: BLACK, BLACK),
    "whole": (lambda p: WHITE, WHITE),
    "enlarged by interpolation": (
        lambda p: np.asarray(Image.fromarray(MASK).resize((128, 96), Image.Resampling.BILINEAR)),
        np.asarray(Image.fromarray(MASK).resize((128, 96), Image.Resampling.NEAREST)),
    ),
}


@pytest.mark.parametrize("case", MARKED)
def test_masks_are_read_as_drawn(case: str, tmp_path: Path) -> None:
    make, expected = MARKED[case]
    source = make(tmp_path)
    mask = opened(source, "L")
    assert set(np.unique(mask)) <= {0, 255}
    # JPEG moves an edge by a pixel here and there
    if isinstance(source, Path) and source.suffix == ".jpg":
        assert (mask != expected).mean() < 0.01
    else:
        assert np.array_equal(mask, expected)


UNCLEAR: dict[str, tuple[Make, str]] = {
    "0 and 1": (
        lambda p: MASK // 255,
        r"has no white pixel \(brightest value 1: save white as 255\)",
    ),
    "labels 1, 2": (lambda p: two((1,), (2,))[..., 0], "has no white pixel .brightest value 2"),
    "labels 1, 2 in 16 bits": (
        lambda p: written(p / "a.png", two((1,), (2,))[..., 0].astype(np.uint16)),
        "is nowhere brighter than 2 of 65535",
    ),
    "label 1 beside white in 16 bits": (
        lambda p: MASK.astype(np.uint16) * 257 + BELOW // 255,
        "has a part of 140 pixels without white .brightest value 1",
    ),
    "levels 85 and 255": (
        lambda p: two((85,), (255,))[..., 0],
        r"has a part of 168 pixels without white \(brightest value 85\): save every defect",
    ),
    "a small label": (
        lambda p: np.where(np.arange(MASK.size).reshape(MASK.shape) == 2999, 3, MASK).astype("u1"),
        "has a part of 1 pixels without white",
    ),
    "a dim label that touches a bright one": (
        lambda p: np.where(np.roll(MASK, 14, 1) > 0, np.uint8(100), MASK),
        "has an area of grey 100 next to white",
    ),
    "dim and bright labels, blurred": (
        lambda p: cv2.GaussianBlur(two((85,), (255,))[..., 0], (0, 0), 1),
        "without white .brightest value 8",
    ),
    "dim and bright labels, JPEG": (
        lambda p: saved(p / "a.jpg", Image.fromarray(two((85,), (255,))[..., 0])),
        "pixels without white",
    ),
    "dark red beside white": (
        lambda p: two((64, 0, 0), (255, 255, 255)),
        "without white .brightest value 64",
    ),
    "red on blue": (lambda p: two((255, 0, 0), (255, 0, 0), (0, 0, 255)), "coloured and has no bl"),
    "red on white": (lambda p: two((255, 0, 0), (255, 0, 0), (255,) * 3), "coloured and has no bl"),
    "a colour map": (
        lambda p: two((253, 231, 36), (253, 231, 36), (68, 1, 84)),
        "coloured and has no black",
    ),
    "alpha, black below": (
        lambda p: np.dstack([BLACK, BLACK, BLACK, MASK]),
        "marks in its alpha channel that are not white: save it without one",
    ),
    "all transparent": (lambda p: np.dstack([MASK, MASK, MASK, BLACK]), "marks in its alpha chan"),
    "alpha over a dark picture": (
        lambda p: np.dstack([RAMP // 2, RAMP // 2, RAMP // 2, MASK]),
        "marks in its alpha channel that are not white",
    ),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_no_part_of_a_mask_is_dropped_without_a_word(case: str, tmp_path: Path) -> None:
    make, match = UNCLEAR[case]
    with pytest.raises(SettingsError, match=match):
        opened(make(tmp_path), "L")


# --- damaged and hostile files ----------------------------------------------------------------


def png(*extra: bytes, after: bytes = b"") -> bytes:
    """A PNG of COLOUR with chunks before its pixels, or bytes in place of its end."""
    file = io.BytesIO()
    Image.fromarray(COLOUR).save(file, "PNG")
    content = file.getvalue()
    cut, end = content.index(b"IDAT") - 4, content.index(b"IEND") - 4
    return content[:cut] + b"".join(extra) + content[cut:end] + (after or content[end:])


HOSTILE = {
    "a broken chunk after the pixels": png(after=b"\0\0\0\4tEXtabcd\1\2\3\4" + chunk(b"IEND", b"")),
    "a chunk of no name after the pixels": png(after=b"\0\0\0\4\0\0\0\0abcd\1\2\3\4"),
    "a zTXt chunk that unpacks to 80 MiB": png(chunk(b"zTXt", b"a\0\0" + BOMB)),
    "an iTXt chunk that unpacks to 80 MiB": png(chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "an iCCP chunk that unpacks to 80 MiB": png(chunk(b"iCCP", b"a\0\0" + BOMB)),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_hostile_png_ends_in_a_picture_or_in_one_line(
    case: str, mode: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(HOSTILE[case])
    assert len(outcome(path, mode).splitlines()) == 1


def outcome(path: Path, mode: str) -> str:
    """Fails by a traceback of anything but the error family."""
    try:
        pixels = opened(path, mode)
    except SettingsError as error:
        return str(error)
    assert pixels.dtype == np.uint8
    return "a picture"
