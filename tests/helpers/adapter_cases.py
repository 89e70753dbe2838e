"""Small adapters, valid and hostile, and what every refusal owes its reader."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dualdiff_engine import adapters
from dualdiff_engine.errors import AdapterError

DATA = Path(__file__).parents[1] / "data"
SELF = "mid_block.attentions.0.transformer_blocks.0.attn1"
TEXT = "mid_block.attentions.0.transformer_blocks.0.attn2"
LAYER = "text_model.encoder.layers.0.self_attn"
CHANNELS, WIDTH, RANK, NARROW = 4, 6, 2, 3

Tensors = dict[str, Tensor]
Change = Callable[[Tensors], None]

# a refusal says what to do; these are the ways it may
REMEDY = re.compile(
    r"copy (it|the file) again|intact copy|another checkpoint|earlier checkpoint|ask the author"
    r"|check the path|check that it is|expected pytorch_lora|pass (one|a)|save (it|only)"
    r"|rename it|remove it or retrain|remove `chained_proc|keep one of them|load that base"
    r"|dualdiff convert"
)


def refusal(load: Callable[[], object], match: str) -> None:
    """`load` must raise an AdapterError whose one line matches and holds a remedy."""
    with pytest.raises(AdapterError) as caught:
        load()
    message = str(caught.value)
    assert re.search(match, message), message
    assert REMEDY.search(message), message
    assert len(message) < 600, message
    assert message.isprintable() or "\n    dualdiff convert" in message, message


def refused(path: Path, match: str, *, allow_pickle: bool = True) -> None:
    refusal(lambda: adapters.load(path, allow_pickle=allow_pickle), match)


# -------------------------------------------------------------------------------------------------


def tiny(*, background: bool = False, chained: bool = False) -> Tensors:
    """A whole adapter of one self site, one text site and one layer of the text encoder."""
    draw = torch.Generator().manual_seed(3)
    shapes: dict[str, tuple[int, ...]] = {}
    for site, context in ((SELF, CHANNELS), (TEXT, WIDTH)):
        prefix = f"unet.{site}.processor."
        if chained and site == SELF:
            prefix += "chained_proc."
        for part in "q", "k", "v", "out":
            inner = context if part in "kv" else CHANNELS
            for branch in 0, 1:
                shapes[f"{prefix}to_{part}_lora.{branch}.down.weight"] = (RANK, inner)
                shapes[f"{prefix}to_{part}_lora.{branch}.up.weight"] = (CHANNELS, RANK)
        for part in "niqkvo":
            square = (CHANNELS,) if part == "n" else (CHANNELS, CHANNELS)
            shapes[f"{prefix}temporal_{part}.weight"] = square
            shapes[f"{prefix}temporal_{part}.bias"] = (CHANNELS,)
        if background:
            for step, out, inner in ((0, NARROW, CHANNELS), (1, CHANNELS, NARROW)):
                shapes[f"{prefix}temporal_condition_mlp.{step}.weight"] = (out, inner)
                shapes[f"{prefix}temporal_condition_mlp.{step}.bias"] = (out,)
            shapes[f"{prefix}temporal_a"] = (1,)
    for part in "q", "k", "v", "out":
        shapes[f"text_encoder.{LAYER}.to_{part}_lora.down.weight"] = (RANK, WIDTH)
        shapes[f"text_encoder.{LAYER}.to_{part}_lora.up.weight"] = (WIDTH, RANK)
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def golden(case: str) -> Tensors:
    path = DATA / case / "adapter" / "pytorch_lora_weights.bin"
    return torch.load(path, weights_only=True)


def saved(folder: Path, tensors: Mapping[str, Tensor], name: str = "a.safetensors") -> Path:
    path = folder / name
    own = {
        key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()
    }
    save_file(own, path)
    return path


def pickled(folder: Path, content: object, name: str = "a.bin", **options: Any) -> Path:
    path = folder / name
    torch.save(content, path, **options)
    return path


def drop(pattern: str) -> Change:
    def change(tensors: Tensors) -> None:
        names = [name for name in tensors if re.search(pattern, name)]
        assert names, pattern
        for name in names:
            del tensors[name]

    return change


def edit(pattern: str, new: Callable[[Tensor], Tensor]) -> Change:
    def change(tensors: Tensors) -> None:
        names = [name for name in tensors if re.search(pattern, name)]
        assert names, pattern
        for name in names:
            tensors[name] = new(tensors[name])

    return change


def rename(pattern: str, new: str) -> Change:
    def change(tensors: Tensors) -> None:
        renamed = {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}
        assert set(renamed) != set(tensors), pattern
        tensors.clear()
        tensors.update(renamed)

    return change


def add(name: str, *shape: int) -> Change:
    def change(tensors: Tensors) -> None:
        assert name not in tensors
        tensors[name] = torch.ones(shape)

    return change


# -------------------------------------------------------------------------------------------------


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file as bytes, true or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes: object) -> dict[str, object]:
    """The header's words for two floats; a field set to None is left out."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def zipped(
    path: Path, program: bytes, *, method: int = zipfile.ZIP_STORED, **records: bytes
) -> Path:
    """What torch.save writes around a pickle, with one storage of four floats."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", records.pop("storage", struct.pack("<4f", 1, 2, 3, 4)))
        archive.writestr("archive/version", "3\n")
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return path


def text_op(text: str) -> bytes:
    """The pickle opcode that pushes a string."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def tensor_ops(
    *, numel: bytes = b"K\x04", offset: bytes = b"K\x00", shape: bytes = b"K\x04\x85",
    strides: bytes = b"K\x01\x85", storage: str = "FloatStorage", key: str = "0",
) -> bytes:  # fmt: skip
    """The pickle opcodes that build a tensor of storage 0."""
    place = text_op("storage") + f"ctorch\n{storage}\n".encode() + text_op(key) + text_op("cpu")
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n((" + place + numel + b"tQ" + offset + shape + strides
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )  # fmt: skip


def one_tensor(**changes: Any) -> bytes:
    """The pickle of {"w": tensor}."""
    return b"\x80\x02}" + text_op("w") + tensor_ops(**changes) + b"s."


class Payload:
    """Runs a call when a careless reader opens the pickle."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


def _script(marker: Path) -> str:
    script = marker.with_name("script.py")
    script.write_text(f"open({str(marker)!r}, 'w').close()")
    return str(script)


def _inner_pickle(marker: Path) -> bytes:
    return pickle.dumps(Payload(os.mkdir, str(marker)))


def _inner_file(marker: Path) -> str:
    path = marker.with_name("inner.pt")
    torch.save(Payload(os.mkdir, str(marker)), path)
    return str(path)


# each leaves `marker` behind when it runs
PAYLOADS: dict[str, Callable[[Path], Payload]] = {
    "os.system": lambda marker: Payload(os.system, f"touch {marker}"),
    "os.mkdir": lambda marker: Payload(os.mkdir, str(marker)),
    "subprocess": lambda marker: Payload(subprocess.check_call, ["touch", str(marker)]),
    "eval": lambda marker: Payload(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Payload(exec, f"open({str(marker)!r}, 'w').close()"),
    "open": lambda marker: Payload(open, str(marker), "w"),
    "shutil": lambda marker: Payload(shutil.copy, __file__, str(marker)),
    "runpy": lambda marker: Payload(runpy.run_path, _script(marker)),
    "pickle.loads": lambda marker: Payload(pickle.loads, _inner_pickle(marker)),
    "torch.load": lambda marker: Payload(
        partial(torch.load, weights_only=False), _inner_file(marker)
    ),
}


# ways to hide a payload in a file


def hide_alone(payload: Payload, path: Path) -> None:
    torch.save(payload, path)


def hide_in_legacy(payload: Payload, path: Path) -> None:
    torch.save({"w": payload}, path, _use_new_zipfile_serialization=False)


def hide_in_raw(payload: Payload, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=2))


def hide_in_swapped(payload: Payload, path: Path) -> None:
    zipped(path, pickle.dumps({"w": payload}, protocol=2))


def hide_in_protocol_4(payload: Payload, path: Path) -> None:
    zipped(path, pickle.dumps({"w": payload}, protocol=4))


def hide_in_protocol_0(payload: Payload, path: Path) -> None:
    zipped(path, pickle.dumps({"w": payload}, protocol=0))


def hide_in_value(payload: Payload, path: Path) -> None:
    torch.save({**tiny(), "w": payload}, path)


def hide_in_key(payload: Payload, path: Path) -> None:
    torch.save({**tiny(), payload: torch.ones(1)}, path)


def hide_in_nested(payload: Payload, path: Path) -> None:
    torch.save({"state_dict": OrderedDict(w=[(payload,)])}, path)


def hide_in_attribute(payload: Payload, path: Path) -> None:
    content = OrderedDict(tiny())
    content._metadata = payload  # type: ignore[attr-defined]
    torch.save(content, path)


def hide_before_a_zip(payload: Payload, path: Path) -> None:
    torch.save(tiny(), path)
    path.write_bytes(pickle.dumps(payload, protocol=2) + path.read_bytes())


def hide_in_second_pickle(payload: Payload, path: Path) -> None:
    zipped(path, one_tensor(), **{"DATA.PKL": pickle.dumps(payload, protocol=2)})


def hide_in_tar(payload: Payload, path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in "sys_info", "pickle", "storages", "tensors":
            content = pickle.dumps(payload, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def hide_in_gzip(payload: Payload, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(payload)))


def forbid(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was reached")

    monkeypatch.setattr(owner, name, called)


def written(path: Path, content: bytes = b"hello") -> Path:
    path.write_bytes(content)
    return path


OURS_NOT = "is not part of a DualAnoDiff adapter: remove it or retrain"
Spread = Callable[[Tensor], Tensor]


def extend(axis: int) -> Spread:
    """One more row or column."""
    return lambda tensor: torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


def both(*changes: Change) -> Change:
    def change(tensors: Tensors) -> None:
        for one in changes:
            one(tensors)

    return change
