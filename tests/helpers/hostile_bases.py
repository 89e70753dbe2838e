"""Base model folders that went wrong: copies of a golden one with one seeded fault each."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support import DATA

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
# nested deeper than Python's stack
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 7, 2**31, 10**9, 10**30, -(10**30)),
    *(0.0, -1.0, 0.5, 1e-30, 1e30, 1e308, "", "x", "1", "__class__", "\ud83d\ude00"),
    *([], {}, [None], [1], [10**9] * 4, [0, 0, 0, 0], ["x"] * 4, {"x": [1]}, [[[[1]]]]),
    ...,
]
DTYPES = [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float64]


def base_copy(folder: Path, case: str = "dual") -> Path:
    """A golden base model that a test may change."""
    target = folder / "base"
    shutil.copytree(DATA / case / "model", target)
    return target


def change_json(path: Path, **values: Any) -> None:
    """Set values of a JSON file; `...` removes one."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        if value is ...:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def change_tensors(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Load, change and save the tensors of a file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def _json_value(path: Path, chance: random.Random) -> str:
    content = json.loads(path.read_text())
    name = chance.choice(sorted(content)) if content else "x"
    value = chance.choice(VALUES)
    change_json(path, **{name: value})
    return f"{name} = {ascii(value)[:40]}"


def _bytes(path: Path, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    kind = chance.choice(["cut", "flip", "flip", "noise", "empty", "pointer", "latin-1", "deep"])
    if kind == "cut":
        del content[chance.randrange(len(content)) :]
    elif kind == "flip":
        # half of them in the header, or what would be one
        reach = chance.choice([len(content), min(len(content), 4096)])
        content[chance.randrange(reach)] ^= 1 << chance.randrange(8)
    else:
        content[:] = {
            "noise": chance.randbytes(1000),
            "empty": b"",
            "pointer": LFS_POINTER,
            "latin-1": b'{"a": "\xe9"}',
            "deep": DEEP,
        }[kind]
    path.write_bytes(content)
    return kind


def _tensors(path: Path, chance: random.Random) -> str:
    kind = chance.choice(["drop", "drop half", "add", "turn", "dtype", "nan", "one name", "flat"])
    done = []

    def change(tensors: dict[str, Any]) -> None:
        name = chance.choice(sorted(tensors))
        tensor = tensors[name]
        done.append(f"{kind} {name}")
        if kind == "drop":
            del tensors[name]
        elif kind == "drop half":
            for other in sorted(tensors)[::2]:
                del tensors[other]
        elif kind == "add":
            tensors[f"{name}.extra"] = torch.ones(2)
        elif kind == "turn":
            tensors[name] = tensor.flatten()[: max(1, tensor.numel() // 2)].clone()
        elif kind == "dtype":
            tensors[name] = tensor.to(chance.choice(DTYPES))
        elif kind == "nan":
            tensors[name] = (
                torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
            )
        elif kind == "one name":
            tensors[name.replace(".", "_", 1)] = tensors.pop(name)
        else:
            tensors[name] = tensor[None].clone()

    change_tensors(path, change)
    return done[0]


def mutate_place(path: Path, chance: random.Random) -> str:
    """Put something that is not a file, or nothing, in a file's place; returns what."""
    kind = chance.choice(["gone", "folder", "pipe", "loop", "dangling", "device"])
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero"}[kind])
    return kind


def mutate(base: Path, seed: int) -> str:
    """Damage one file of a base model; returns what was done."""
    chance = random.Random(seed)
    files = sorted(path for path in base.rglob("*") if path.is_file())
    jsons = [path for path in files if path.suffix == ".json"]
    weights = [path for path in files if path.suffix == ".safetensors"]
    damage, choice = chance.choice(
        [(_json_value, jsons)] * 4 + [(_bytes, files)] * 2 + [(_tensors, weights)] * 2
        + [(mutate_place, files)]
    )  # fmt: skip
    path = chance.choice(choice)
    what = damage.__name__.replace("mutate", "").strip("_")
    return f"{path.relative_to(base)}: {what} {damage(path, chance)}"
