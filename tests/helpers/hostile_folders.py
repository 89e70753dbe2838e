"""What a run left in a folder, gone wrong: manifests and training states with one seeded fault."""

from __future__ import annotations

import json
import random
from pathlib import Path

from hostile_bases import DEEP, VALUES, mutate_place


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def _rows(path: Path, chance: random.Random) -> str:
    """Whole lines lost, doubled, moved, or from somewhere else."""
    lines = _lines(path)
    kind = chance.choice(
        ["lost", "twice", "moved", "all lost", "blank", "text", "deep", "no end", "carriage return"]
    )
    at = chance.randrange(len(lines))
    if kind == "lost":
        del lines[at]
    elif kind == "twice":
        lines.insert(at, lines[at])
    elif kind == "moved":
        lines.insert(chance.randrange(len(lines)), lines.pop(at))
    elif kind == "no end":
        lines[-1] = lines[-1].rstrip(b"\n")
    elif kind == "carriage return":
        lines = [line.replace(b"\n", b"\r\n") for line in lines]
    elif kind == "all lost":
        lines.clear()
    else:
        lines.insert(at, {"blank": b"\n", "text": b"hello\n", "deep": DEEP + b"\n"}[kind])
    path.write_bytes(b"".join(lines))
    return f"line {at}: {kind}"


def _value(path: Path, chance: random.Random) -> str:
    """A value of a row, or of its recipe."""
    lines = _lines(path)
    at = chance.randrange(len(lines))
    row = json.loads(lines[at])
    place = chance.choice([row, row, row["recipe"], row["recipe"]["sampling"]])
    name, value = chance.choice(sorted(place)), chance.choice(VALUES)
    if value is ...:
        del place[name]
    else:
        place[name] = value
    lines[at] = json.dumps(row).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    return f"line {at}: {name} = {ascii(value)[:40]}"


def _bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kinds = ["cut", "cut", "flip", "flip", "flip", "zeros", "zeros at the end", "mark"]
    kind = chance.choice(kinds)
    at = chance.randrange(len(content))
    if kind == "cut":
        del content[at:]
    elif kind == "flip":
        content[at] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        content[at : at + 100] = bytes(len(content[at : at + 100]))
    elif kind == "zeros at the end":
        # as file systems leave it when the power goes
        content += bytes(4096)
    else:
        content[:0] = b"\xef\xbb\xbf"
    path.write_bytes(content)
    return f"bytes: {kind} at {at}"


def mutate_manifest(path: Path, seed: int) -> str:
    """Damage the manifest of a folder with pairs; returns what was done."""
    chance = random.Random(seed)
    damage = chance.choice([_rows] * 3 + [_value] * 4 + [_bytes] * 4 + [mutate_place])
    return damage(path, chance)


def mutate_picture(folder: Path, chance: random.Random) -> str:
    """Damage one of the pictures that a manifest lists."""
    path = chance.choice(sorted(folder.glob("*/*.png")))
    content = bytearray(path.read_bytes())
    kind = chance.choice(["gone", "cut", "flip", "empty", "folder"])
    if kind in ("gone", "folder"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        return f"{path.parent.name}/{path.name}: {kind}"
    if kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "flip":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        content.clear()
    path.write_bytes(content)
    return f"{path.parent.name}/{path.name}: {kind}"
