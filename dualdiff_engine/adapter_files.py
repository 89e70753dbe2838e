"""Adapter files from strangers: found, bounded, read without running anything they hold.

A `.safetensors` header is checked before a tensor is read. A `.bin` is a pickle: it is opened only
when the caller says so, always with `weights_only`, and only in the zip form that `torch.save`
writes. What the names mean is `dualdiff_engine.adapters`' business.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import stat
import struct
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualdiff_engine.errors import AdapterError

STEM = "pytorch_lora_weights"

# an SD-1.5 adapter with background and rank 128 is 0.75 GB in fp32; four times that is no adapter
MAX_FILE_BYTES = 3 << 30
# 32 sites of 31 tensors and 12 text layers of 8 need 1,100 names; SD-2.1's 23 layers a few more
MAX_TENSORS = 8192
MAX_HEADER_BYTES = 4 << 20
MAX_NAME = 256
FLOAT_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def find(source: str | Path, *, allow_pickle: bool) -> Path:
    """The weights file of a file, an adapter folder, or a `checkpoint-N` folder."""
    path = Path(source)
    if path.is_dir():
        candidates = [path / f"{STEM}.safetensors", path / f"{STEM}.bin"]
        found = [p for p in candidates if p.exists()]
        if not found:
            steps = sorted(p.name for p in path.glob("checkpoint-*") if p.is_dir())
            hint = (
                f"; it holds {', '.join(steps[:8])}: pass one of them"
                if steps
                else f"; expected {STEM}.safetensors"
            )
            raise AdapterError(f"no adapter in folder {str(path)!r}{hint}")
        path = found[0]
    if not path.exists():
        raise AdapterError(f"no adapter at {str(path)!r}: check the path")
    if not stat.S_ISREG(path.stat().st_mode):
        raise AdapterError(f"{str(path)!r} is not a regular file")
    if path.suffix not in (".safetensors", ".bin"):
        raise AdapterError(
            f"{path.name!r} is neither .safetensors nor .bin: rename it if it is an adapter"
        )
    if path.suffix == ".bin" and not allow_pickle:
        raise AdapterError(
            f"{str(path)!r} is a pickle, which can run code when opened; convert it once with\n"
            f"    dualdiff convert {path} {path.with_suffix('.safetensors')}\n"
            "and use the result (or pass allow_pickle=True for a file you trust)"
        )
    return path


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that `find` returned, on the CPU, floating point, checked finite."""
    size = path.stat().st_size
    if size == 0:
        raise AdapterError(f"{path.name} is empty: copy it again")
    if size > MAX_FILE_BYTES:
        raise AdapterError(
            f"{path.name} has {size:,} bytes; an adapter has {MAX_FILE_BYTES:,} at most"
        )
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not tensors:
        raise AdapterError(f"{path.name} holds no tensors")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(
                f"{path.name}: {name} holds NaN or infinity; the training diverged or the file is "
                "damaged: use an earlier checkpoint"
            )
    return tensors


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write `.safetensors` so that a crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, partial, {"format": "pt"})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _check_header(path: Path) -> None:
    """Refuse what `safetensors` itself would accept: other dtypes, floods of tensors, long names.

    Layout: https://github.com/huggingface/safetensors, "Format".
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise AdapterError(f"{path.name} is cut off after {size} bytes: copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise AdapterError(
                f"{path.name} claims a header of {length:,} bytes in a file of {size:,}: it is "
                "damaged or not a safetensors file"
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        entries = {str(k): v for k, v in header.items() if k != "__metadata__"}
        shapes = {k: (v["dtype"], v["shape"], v["data_offsets"]) for k, v in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(
            f"{path.name} has no readable safetensors header: copy it again"
        ) from error
    _check_names(path, list(shapes))
    for name, (dtype, shape, offsets) in shapes.items():
        if dtype not in FLOAT_DTYPES:
            raise AdapterError(
                f"{path.name}: {name} is {dtype!r}; adapters hold floating point only"
            )
        plausible = isinstance(shape, list) and all(
            isinstance(n, int) and 0 < n <= size for n in shape
        )
        claimed = math.prod(shape) * FLOAT_DTYPES[dtype] if plausible else -1
        if not (
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(isinstance(n, int) for n in offsets)
            and 0 <= offsets[0] <= offsets[1] <= size - 8 - length
            and offsets[1] - offsets[0] == claimed
        ):
            raise AdapterError(
                f"{path.name}: the header's shape and place of {name} do not fit the file of "
                f"{size:,} bytes: it is cut off or damaged, copy it again"
            )


def _check_names(path: Path, names: list[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise AdapterError(
            f"{path.name} holds {len(names):,} tensors; an adapter has {MAX_TENSORS} at most"
        )
    for name in names:
        if len(name) > MAX_NAME or not re.fullmatch(r"[\w.\-]+", name, re.ASCII):
            raise AdapterError(f"{path.name} holds a tensor with an unusable name: {name[:80]!r}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise AdapterError(
            f"{path.name} is not a sound safetensors file ({error}): copy it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise AdapterError(
            f"{path.name} is not what torch.save writes (cut off, or an old pickle): copy it again, "
            "or save it again with a current PyTorch"
        ) from error
    # torch.save stores without compression; anything else is a decompression bomb
    if len(entries) > MAX_TENSORS or sum(entry.file_size for entry in entries) > size:
        raise AdapterError(f"{path.name} unpacks to more than its own size: refused")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterError(
            f"{path.name} holds more than tensors and was not opened: ask its author for .safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise AdapterError(
            f"{path.name} is damaged ({type(error).__name__}): copy it again"
        ) from error
    return _plain_tensors(path, content)


def _plain_tensors(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise AdapterError(f"{path.name} is not a flat dict of named tensors")
    _check_names(path, list(content))
    total = 0
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise AdapterError(f"{path.name}: {name} is not a plain tensor")
        if tensor.dtype not in FLOATS or tensor.numel() == 0:
            raise AdapterError(
                f"{path.name}: {name} is {tensor.dtype}, {tuple(tensor.shape)}; expected floating point"
            )
        total += tensor.numel() * tensor.element_size()
    # expanded views claim gigabytes that the file does not hold
    if total > path.stat().st_size:
        raise AdapterError(
            f"{path.name} claims {total:,} bytes of tensors in a smaller file: refused"
        )
    return {name: tensor.detach() for name, tensor in content.items()}
