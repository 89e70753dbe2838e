"""Adapter files that went wrong: bytes of a golden one with one seeded fault each."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hostile_bases import DEEP, LFS_POINTER, VALUES

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", "")
SIZES = (-1, 0, 1, 7, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, 10**30, 1.5, True, None, "1")

Header = dict[str, Any]


def _split(content: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: Header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def damaged_bytes(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was done, and the result. Half of the changes are where headers are."""
    rare = ["zeros", "noise", "insert", "remove", "double", "empty", "pointer", "deep"]
    kind = chance.choice(["cut"] * 2 + ["flip"] * 3 + rare)
    changed = bytearray(content)
    reach = chance.choice([len(content), min(len(content), 4096), min(len(content), 64)])
    at = chance.randrange(reach)
    length = chance.choice([1, 4, 100, 10_000])
    if kind == "cut":
        del changed[at:]
    elif kind == "flip":
        changed[at] ^= 1 << chance.randrange(8)
    elif kind == "zeros":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif kind == "noise":
        changed[at : at + length] = chance.randbytes(len(changed[at : at + length]))
    elif kind == "insert":
        changed[at:at] = chance.randbytes(length)
    elif kind == "remove":
        del changed[at : at + length]
    elif kind == "double":
        changed *= 2
    else:
        changed[:] = {"empty": b"", "pointer": LFS_POINTER, "deep": DEEP}[kind]
    return f"bytes: {kind} at {at}", bytes(changed)


def _length(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """The length of the header, a lie."""
    (true,) = struct.unpack("<Q", content[:8])
    said = chance.choice([0, 1, 2, true - 1, true + 1, 2 * true, len(content), 1 << 32, 2**64 - 1])
    return f"header length {said}", struct.pack("<Q", said) + content[8:]


def _entry(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """One field of one tensor's entry in the header."""
    header, data = _split(content)
    name = chance.choice(sorted(set(header) - {"__metadata__"}))
    kind = chance.choice(["dtype", "shape", "size", "offsets", "offset", "swap", "value", "gone"])
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif kind == "shape":
        entry["shape"] = chance.choice([[], [1] * 70, entry["shape"][::-1], [2**32, 2**32], "x"])
    elif kind == "size":
        entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice(SIZES)
    elif kind == "offsets":
        entry["data_offsets"] = chance.choice([[], [0, 2**40], [8, 0], [0], [0, 1, 2], {}])
    elif kind == "offset":
        entry["data_offsets"][chance.randrange(2)] = chance.choice(SIZES)
    elif kind == "swap":
        other = header[chance.choice(sorted(set(header) - {"__metadata__", name}))]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    elif kind == "value":
        header[name] = chance.choice([v for v in VALUES if v is not ...])
    else:
        del header[name]
    return f"entry: {kind} of {name}", _joined(header, data)


def _whole_header(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Metadata, floods of names, names that are none."""
    header, data = _split(content)
    kind = chance.choice(["metadata", "flood", "name", "long name", "twice", "list"])
    if kind == "metadata":
        header["__metadata__"] = chance.choice([1, [], {"a": 1}, {"a": "x" * (1 << 20)}, {"": ""}])
    elif kind == "flood":
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header |= {f"unet.{n}": empty for n in range(chance.choice([100, 9000, 60_000]))}
    elif kind in ("name", "long name"):
        name = chance.choice(sorted(set(header) - {"__metadata__"}))
        new = {"name": "\x1b[2J\n../../x\0", "long name": "unet." + "a" * 100_000}[kind]
        header[new] = header.pop(name)
    elif kind == "twice":
        text = json.dumps(header).encode()
        first = text[1 : text.index(b"}}") if b"}}" in text[:400] else text.index(b"}") + 1]
        text = b"{" + first + b"," + text[1:]
        return "header: a name twice", struct.pack("<Q", len(text)) + text + data
    else:
        text = json.dumps([header]).encode()
        return "header: a list", struct.pack("<Q", len(text)) + text + data
    return f"header: {kind}", _joined(header, data)


# what is done to the tensors, and whether the rest can still be an adapter
TENSORS = {
    "drop": False,
    "drop half": False,
    "add": False,
    "rename": False,
    "nan": False,
    "one infinity": False,
    "transposed": True,
    "cut": False,
    "one dimension more": False,
    "integers": False,
    "huge": True,
    "zeros": True,
    "rounded": True,
    "doubles": True,
}


def _tensors(path: Path, chance: random.Random) -> str:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    kind = chance.choice(sorted(TENSORS))
    name = chance.choice(sorted(tensors))
    tensor = tensors[name].clone()
    if kind == "drop":
        del tensors[name]
    elif kind == "drop half":
        tensors = {other: tensors[other] for other in sorted(tensors)[::2]}
    elif kind == "add":
        tensors[f"{name}.extra"] = torch.ones(2)
    elif kind == "rename":
        del tensors[name]
        tensors[name.replace("processor", "process0r").replace("text_encoder", "te")] = tensor
    elif kind == "one infinity":
        tensor.view(-1)[chance.randrange(tensor.numel())] = float("inf")
        tensors[name] = tensor
    else:
        tensors[name] = {
            "nan": lambda: torch.full_like(tensor, float("nan")),
            "transposed": lambda: tensor.t().contiguous() if tensor.dim() == 2 else tensor.flip(0),
            "cut": lambda: tensor.flatten()[: tensor.numel() // 2 + 1][:, None, None].clone(),
            "one dimension more": lambda: tensor[None].clone(),
            "integers": lambda: tensor.to(torch.int32),
            "huge": lambda: torch.full_like(tensor.float(), 3e38),
            "zeros": lambda: torch.zeros_like(tensor),
            "rounded": lambda: tensor.to(torch.bfloat16),
            "doubles": lambda: tensor.to(torch.float64),
        }[kind]()
    save_file(tensors, path, metadata)
    return f"tensors: {kind} {name}"


CHANGES: tuple[Callable[[bytes, random.Random], tuple[str, bytes]], ...] = (
    *(damaged_bytes, damaged_bytes, _length, _entry, _entry, _whole_header),
)


def mutate(path: Path, seed: int) -> str:
    """Damage an adapter file, `.safetensors` or `.bin`; returns what was done."""
    chance = random.Random(seed)
    if path.suffix == ".bin":
        fault, content = damaged_bytes(path.read_bytes(), chance)
        path.write_bytes(content)
        return f"pickle, {fault}"
    if chance.random() < 0.4:
        return _tensors(path, chance)
    fault, content = chance.choice(CHANGES)(path.read_bytes(), chance)
    path.write_bytes(content)
    return fault


def must_be_refused(fault: str) -> bool:
    """Whether no adapter can be meant by what is left."""
    kind = fault.removeprefix("tensors: ").rpartition(" ")[0]
    return fault.startswith("tensors: ") and not TENSORS[kind]
