"""Picture files that went wrong: small ones of every format, with one seeded fault each."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64
RAMP = (40 + 2 * np.mgrid[:HEIGHT, :WIDTH][1]).astype(np.uint8)
COLOUR = np.stack([RAMP, RAMP // 2, 255 - RAMP], 2)
WHITE = np.full_like(RAMP, 255)
DEEP = RAMP.astype(np.uint16) * 257

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BOMB = zlib.compress(b"\0" * (80 << 20), 9)
# sides and counts that files claim
CLAIMS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def with_tag(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def claiming(width: int, height: int) -> bytes:
    """A PNG that says it has so many pixels and holds a hundred bytes of them."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return SIGNATURE + chunk(b"IHDR", header) + pixels


def seeds() -> dict[str, list[bytes]]:
    """Small files of every format that is read."""
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    animated = {"save_all": True, "append_images": frames[1:], "duration": 50}
    images: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("PNG", COLOUR, {"exif": with_tag(6)}),
        ("PNG", DEEP, {}),
        ("PNG", np.dstack([COLOUR, WHITE]), {}),
        ("PNG", RAMP, {"icc_profile": b"\0" * 200, "dpi": (72, 72)}),
        ("JPEG", COLOUR, {"exif": with_tag(3)}),
        ("JPEG", RAMP, {"progressive": True}),
        ("JPEG2000", COLOUR, {}),
        ("TIFF", COLOUR, {"compression": "tiff_lzw", "exif": with_tag(8)}),
        ("TIFF", DEEP, {}),
        ("TIFF", RAMP.astype(np.float32) / 255, {"compression": "tiff_deflate"}),
        ("TIFF", RAMP, {"save_all": True, "append_images": frames[1:]}),
        ("TIFF", RAMP > 100, {"compression": "group4"}),
        ("BMP", COLOUR, {}),
        ("GIF", RAMP, {}),
        ("GIF", RAMP, animated),
        ("PPM", COLOUR, {}),
        ("WEBP", COLOUR, {"lossless": True}),
        ("WEBP", COLOUR, {"quality": 80}),
        ("WEBP", RAMP, animated),
    ]
    contents: dict[str, list[bytes]] = {}
    for form, pixels, options in images:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, form, **options)
        contents.setdefault(form, []).append(file.getvalue())
    return contents


def damaged_bytes(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Bytes changed (more of them where headers are), removed, doubled, or cut off."""
    changed = bytearray(content)
    count = chance.randint(1, 5)
    for _ in range(count):
        span = len(changed) if chance.random() < 0.5 else min(len(changed), 200)
        at = chance.randrange(span)
        kind = chance.randrange(6)
        if kind < 3:
            changed[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        elif kind == 3:
            changed[at : at + 4] = chance.randbytes(4)
        elif kind == 4:
            changed[at:at] = changed[at : at + chance.randint(1, 39)]
        else:
            del changed[at : at + chance.randint(1, 39)]
        if len(changed) < 20:
            break
    return f"{count} changes", bytes(changed)


def _cut(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    length = chance.randrange(len(content))
    return f"cut to {length} bytes", content[:length]


def _claim(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A number of two or four bytes in the header, in either order, becomes an extreme one."""
    form = chance.choice(["<H", ">H", "<I", ">I"])
    size = struct.calcsize(form)
    value = chance.choice(CLAIMS) & (256**size - 1)
    at = chance.randrange(max(1, min(len(content), 300) - size))
    return f"{value:#x} at {at}", content[:at] + struct.pack(form, value) + content[at + size :]


def _chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], len(SIGNATURE)
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def _unpacks_to_much(chance: random.Random) -> tuple[bytes, bytes]:
    """A text or colour profile of 80 MiB, or a tag that no reader knows."""
    return chance.choice(
        [
            (b"zTXt", b"a\0\0" + BOMB),
            (b"iTXt", b"a\0\1\0\0\0" + BOMB),
            (b"iCCP", b"a\0\0" + BOMB),
            (b"abCd", chance.randbytes(50)),
            (b"eXIf", b"II*\0" + chance.randbytes(40)),
            (b"tRNS", chance.randbytes(6)),
            (b"acTL", struct.pack(">II", chance.choice(CLAIMS), 0)),
            (b"IDAT", BOMB),
        ]
    )


def _png_chunks(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A chunk changed, lost, doubled, moved or added; its checksum is right."""
    chunks = _chunks(content)
    kind = chance.choice(["content", "content", "size", "lost", "twice", "moved", "added", "name"])
    at = chance.randrange(len(chunks))
    name, body = chunks[at]
    if kind == "content" and body:
        changed = bytearray(body)
        changed[chance.randrange(len(changed))] = chance.randrange(256)
        chunks[at] = name, bytes(changed)
    elif kind == "size":
        # width, height, depth, colour type: the first 13 bytes of the first chunk
        head = list(struct.unpack(">IIBBBBB", chunks[0][1]))
        which = chance.randrange(7)
        head[which] = chance.choice(CLAIMS) & (0xFFFFFFFF if which < 2 else 0xFF)
        chunks[0] = chunks[0][0], struct.pack(">IIBBBBB", *head)
    elif kind == "lost":
        del chunks[at]
    elif kind == "twice":
        chunks.insert(at, chunks[at])
    elif kind == "moved":
        chunks.insert(chance.randrange(len(chunks)), chunks.pop(at))
    elif kind == "name":
        chunks[at] = bytes(chance.choice(b"AIPabtZ\0") for _ in range(4)), body
    else:
        name, body = _unpacks_to_much(chance)
        chunks.insert(at, (name, body))
    said = f"PNG chunk {name.decode('latin-1')}: {kind}"
    return said, SIGNATURE + b"".join(chunk(*c) for c in chunks)


def _bomb(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """A few bytes that claim or unpack to very many pixels."""
    side = chance.choice([7_999, 8_001, 20_000, 65_535])
    form = chance.choice(["claim", "PNG", "TIFF", "GIF", "WEBP"])
    if form == "claim":
        return f"PNG claims {side}²", claiming(side, chance.choice([side, 1, 0xFFFFFFFF]))
    if form == "WEBP":
        side = min(side, 8_001)
    file = io.BytesIO()
    # black packs well; 20,000² of it would take a while to write
    side = min(side, 8_200)
    options = {"TIFF": {"compression": "tiff_deflate"}, "PNG": {"compress_level": 1}}
    Image.new("L", (side, side)).save(file, form, **options.get(form, {}))
    return f"{form} of {side}² black pixels", file.getvalue()


def mutate(contents: dict[str, list[bytes]], seed: int) -> tuple[str, bytes]:
    """A damaged file, and what was done to it."""
    chance = random.Random(seed)
    form = chance.choice(sorted(contents))
    content = chance.choice(contents[form])
    ways: list[Callable[[bytes, random.Random], tuple[str, bytes]]] = (
        [damaged_bytes] * 10 + [_claim] * 5 + [_cut] * 3
    )
    if form == "PNG":
        ways += [_png_chunks] * 30
    if seed % 30 == 0:
        ways = [_bomb]
    fault, changed = chance.choice(ways)(content, chance)
    return f"{form}: {fault}", changed
