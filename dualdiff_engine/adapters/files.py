"""Find and read adapter files from other people without running code that they hold.

The header of a `.safetensors` file is checked before a tensor is read. A `.bin` file is a pickle.
It is opened only if the caller asks for it, always with `weights_only`, and only in the zip form
that `torch.save` writes, referring to nothing but tensors. `adapters.format` reads the names.
"""

from __future__ import annotations

import json
import math
import pickle
import pickletools
import re
import shlex
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualdiff_engine.adapters.distilled import Distilled
from dualdiff_engine.errors import AdapterError
from dualdiff_engine.files import sha256_of, written_whole
from dualdiff_engine.model.coupling import Coupling

STEM = "pytorch_lora_weights"
# of a file's metadata; the window of a distilled or coupled adapter is in its own entry
WINDOW, DISTILLED, COUPLING = "dualdiff_window", "dualdiff_distilled", "coupling"

# an SD-1.5 adapter with background and rank 128 is 0.75 GB in fp32; four times that is too much
MAX_FILE_BYTES = 3 << 30
# 32 sites of 31 tensors and 12 text layers of 8 need 1,100 names; SD-2.1's 23 layers a few more
MAX_TENSORS = 8192
MAX_HEADER_BYTES = 4 << 20
MAX_NAME = 256
# an adapter needs two; other families' tensors are to be refused by name, not here
MAX_DIMS = 8
FLOAT_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# what the pickle of a flat dict of tensors calls; `weights_only` alone would also run `bytearray`,
# which a hundred bytes of pickle can fill a machine's memory with
_PICKLE_NAMES = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch [A-Z]\w+Storage"
)
_ASK = "ask the author for a .safetensors file"
# four or five a tensor; CPython hashes tuples by recursion and crashes on one nested deeply
_MAX_TUPLES = 8 * MAX_TENSORS
_ZIP_MAGIC = b"PK\x03\x04"


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"{str(path)!r} cannot be read ({error.strerror or error}): check the path and its "
            "permissions"
        ) from error


def find(source: str | Path, *, allow_pickle: bool) -> Path:
    """The weights file of a file, an adapter folder, or a `checkpoint-N` folder."""
    path = Path(source)
    with _readable(path):
        if path.is_dir():
            path = _find_in(path)
        if not path.exists():
            raise AdapterError(f"no adapter at {str(path)!r}: check the path")
        if not stat.S_ISREG(path.stat().st_mode):
            raise AdapterError(f"{str(path)!r} is not a regular file: pass a .safetensors file")
    if path.suffix not in (".safetensors", ".bin"):
        raise AdapterError(
            f"{path.name!r} is neither .safetensors nor .bin: rename it if it is an adapter"
        )
    if path.suffix == ".bin" and not allow_pickle:
        target = path.with_suffix(".safetensors")
        raise AdapterError(
            f"{str(path)!r} is a pickle, which can run code when opened; convert it once with\n"
            f"    dualdiff convert {shlex.quote(str(path))} {shlex.quote(str(target))}\n"
            "and use the result (or pass allow_pickle=True for a file you trust)"
        )
    return path


def _find_in(folder: Path) -> Path:
    for name in (f"{STEM}.safetensors", f"{STEM}.bin"):
        if (folder / name).exists():
            return folder / name
    steps = [p.name for p in folder.glob("checkpoint-*") if p.is_dir()]
    # by number, latest first
    steps.sort(key=lambda name: (len(name), name), reverse=True)
    hint = (
        f"it holds {', '.join(steps[:8])}: pass one of them"
        if steps
        else f"expected {STEM}.safetensors"
    )
    raise AdapterError(f"no adapter in folder {str(folder)!r}; {hint}")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that `find` returned, on the CPU, floating point, checked finite."""
    with _readable(path):
        size = path.stat().st_size
        if size == 0:
            raise AdapterError(f"{path.name!r} is empty: copy it again")
        if size > MAX_FILE_BYTES:
            raise AdapterError(
                f"{path.name!r} has {size:,} bytes; an adapter has at most {MAX_FILE_BYTES:,}: "
                "check that it is the right file"
            )
        tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not tensors:
        raise AdapterError(f"{path.name!r} holds no tensors: check that it is the right file")
    if name := not_finite(tensors):
        raise AdapterError(
            f"{path.name!r}: {name} holds NaN or infinity; the training diverged or the file is "
            "damaged: use an earlier checkpoint"
        )
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity, if there is one."""
    return next((n for n, t in tensors.items() if not bool(torch.isfinite(t).all())), None)


def sha256(path: Path) -> str:
    with _readable(path):
        return sha256_of(path)


@dataclass(frozen=True)
class Origin:
    """How a file's adapter was trained, as far as the file says.

    window: the ratio of the windows that it was trained on (`dualdiff train --window`). distilled:
    the guidance that it holds. coupling: of the branches; None: DualAnoDiff's.
    """

    window: float | None = None
    distilled: Distilled | None = None
    coupling: Coupling | None = None

    def metadata(self) -> dict[str, str]:
        """One entry: safetensors writes several in any order, and equal runs give equal files."""
        if self.distilled is not None:
            row = {**asdict(self.distilled), "window": self.window}
            return {DISTILLED: json.dumps(row, sort_keys=True)}
        if self.coupling is not None:
            row = {**self.coupling.record(), "window": self.window}
            return {COUPLING: json.dumps(row, sort_keys=True)}
        return {"format": "pt"} if self.window is None else {WINDOW: str(self.window)}


def origin(path: Path) -> Origin:
    """Raises AdapterError for a file that says that it holds guidance, but not which, and for a
    coupling that is not known.
    """
    if path.suffix != ".safetensors":
        return Origin()
    with _readable(path):
        metadata = _header(path)[0].get("__metadata__")
    if not isinstance(metadata, dict):
        return Origin()
    if COUPLING in metadata:
        return _coupled(path, metadata[COUPLING])
    if DISTILLED not in metadata:
        return Origin(_window(metadata.get(WINDOW)))
    try:
        row = json.loads(metadata[DISTILLED])
        return Origin(_window(row.get("window")), Distilled.of(row))
    # hundreds of brackets end in a RecursionError
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"{path.name!r} says that it holds guidance, but not which ({error}): copy it again, "
            "or use its teacher"
        ) from error


def _coupled(path: Path, text: object) -> Origin:
    try:
        row = json.loads(text) if isinstance(text, str) else {}
        coupling = Coupling.of(row)
        return Origin(_window(row.get("window")), coupling=coupling)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path.name!r} names a coupling that is not known here ({error}): copy it again, or "
            "use a newer release"
        ) from error


def _window(value: object) -> float | None:
    try:
        ratio = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        # of another program, or damaged: the adapter itself is whole
        return None
    return ratio if 1 <= ratio <= 1000 else None


def write(path: Path, tensors: dict[str, Tensor], made: Origin | None = None) -> None:
    """Write `.safetensors` so that a crash leaves the old file or none.

    made: how the adapter was trained.

    Raises AdapterError, before anything is written, for NaN or infinity, and OutputError.
    """
    if name := not_finite(tensors):
        dtype = str(tensors[name].dtype).removeprefix("torch.")
        raise AdapterError(
            f"{str(path)!r} is not written: {name} holds NaN or infinity in {dtype}; float16 ends "
            "at 65504, so save as float32, or use an earlier checkpoint if the training diverged"
        )
    # safetensors refuses shared memory, and would lose the sign of a negated view
    own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    with written_whole(path) as partial:
        save_file(own, partial, (made or Origin()).metadata())


def _check_header(path: Path) -> None:
    """Refuse what `safetensors` itself would accept: other dtypes, floods of tensors, long names.

    Layout: https://github.com/huggingface/safetensors, "Format".
    """
    header, room = _header(path)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    _check_names(path, list(entries))
    for name, entry in entries.items():
        _check_entry(f"{path.name!r}: {name}", entry, room)


def _header(path: Path) -> tuple[dict[str, object], int]:
    """The parsed header, and how many bytes of tensors follow it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise AdapterError(f"{path.name!r} is cut off after {size} bytes: copy it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise AdapterError(
                f"{path.name!r} has an invalid header ({length:,} bytes in a file of {size:,}): "
                "copy the file again, or rename it to .bin if it is a pickle"
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"{path.name!r} has no readable safetensors header ({error}): copy it again"
        ) from error
    if not isinstance(header, dict):
        raise AdapterError(f"the header of {path.name!r} is not a JSON object: copy the file again")
    return header, size - 8 - length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object without the duplicate names that `json` would let the last one win."""
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{twice[:MAX_NAME]!r} occurs twice")
    return content


def _check_entry(where: str, entry: object, room: int) -> None:
    """Dtype, shape and place of one tensor in a safetensors header."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise AdapterError(
            f"{where} has no dtype, shape or data_offsets: the header is damaged, copy the file "
            "again"
        )
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise AdapterError(
            f"{where} has dtype {str(dtype)[:40]!r}; adapters hold floating-point tensors only: "
            "save it as F32"
        )
    plausible = _counts(shape, room) and len(shape) <= MAX_DIMS and 0 not in shape
    plausible = plausible and _counts(place, room) and len(place) == 2
    if not plausible or place[1] - place[0] != math.prod(shape) * FLOAT_DTYPES[dtype]:
        raise AdapterError(
            f"{where} has shape {str(shape)[:60]} at bytes {str(place)[:60]} of {room:,}, which do "
            "not match: the file is cut off or damaged, copy it again"
        )


def _counts(numbers: object, limit: int) -> bool:
    # `True` is an int in Python, but not in safetensors
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n <= limit for n in numbers)


def _check_names(path: Path, names: list[str]) -> None:
    if len(names) > MAX_TENSORS:
        raise AdapterError(
            f"{path.name!r} holds {len(names):,} tensors; an adapter has at most {MAX_TENSORS:,}: "
            "check that it is the right file"
        )
    for name in names:
        if len(name) > MAX_NAME or not re.fullmatch(r"[\w.\-]+", name, re.ASCII):
            raise AdapterError(
                f"{path.name!r} holds a tensor with an invalid name, {name[:80]!r}: check that it "
                "is the right file"
            )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    _check_header(path)
    try:
        return load_file(path)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterError(
            f"{path.name!r} is not a valid safetensors file ({error}): copy it again"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        try:
            _check_archive(path, file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except AdapterError:
            raise
        except pickle.UnpicklingError as error:
            raise AdapterError(
                f"{path.name!r} holds more than tensors, so it was not opened: {_ASK}"
            ) from error
        # a foreign program for two interpreters: whatever they raise, the file is at fault
        except Exception as error:
            raise AdapterError(
                f"{path.name!r} is damaged ({type(error).__name__}): copy it again"
            ) from error
    return _plain_tensors(path, content)


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Refuse what unpacks to more than the file holds, and pickles that name more than tensors."""
    size = path.stat().st_size
    # zipfile also finds an archive behind another pickle, torch.load then reads that pickle
    if file.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
        raise AdapterError(
            f"{path.name!r} was not written by torch.save: copy it again. If it is an old pickle, "
            "save it again with a current PyTorch; if it is a .safetensors file, rename it"
        )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # torch.save stores without compression; anything else is a decompression bomb
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or sum(entry.file_size for entry in entries) > size:
            raise AdapterError(f"{path.name!r} unpacks to more than its own size: {_ASK}")
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        # torch's reader takes either case, and would load a storage once for every spelling
        names = [entry.filename.lower() for entry in entries]
        storages = [name.partition("/data/")[2] for name in names if "/data/" in name]
        numbered = all(storage.isdigit() for storage in storages)
        if len(pickles) != 1 or len(set(names)) < len(names) or not numbered:
            raise AdapterError(
                f"{path.name!r} does not have the layout of torch.save ({len(pickles)} pickles "
                f"among {len(names)} files): {_ASK}"
            )
        if pickles[0].file_size > MAX_HEADER_BYTES:
            raise AdapterError(
                f"{path.name!r} has a pickle of {pickles[0].file_size:,} bytes; an adapter's has "
                f"at most {MAX_HEADER_BYTES:,}: {_ASK}"
            )
        _check_opcodes(path, archive.read(pickles[0]))


def _check_opcodes(path: Path, program: bytes) -> None:
    """Look at a pickle without running it."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(program):
        tuples += opcode.name.startswith("TUPLE")
        if opcode.name == "GLOBAL" and not _PICKLE_NAMES.fullmatch(str(argument)):
            named = str(argument)[:80].replace(" ", ".")
            raise AdapterError(
                f"{path.name!r} refers to {named!r}, which tensors do not need, so it was not "
                f"opened: {_ASK}"
            )
    if tuples > _MAX_TUPLES:
        raise AdapterError(f"{path.name!r} holds {tuples:,} tuples, more than tensors need: {_ASK}")


def _plain_tensors(path: Path, content: object) -> dict[str, Tensor]:
    # a pickle can hang an attribute `items` on a dict: ask the type, not the object
    pairs = list(dict.items(content)) if isinstance(content, dict) else None
    if pairs is None or not all(isinstance(name, str) for name, _ in pairs):
        raise AdapterError(
            f"{path.name!r} is not a flat dict of named tensors: save only the adapter's tensors"
        )
    _check_names(path, [name for name, _ in pairs])
    tensors: dict[str, Tensor] = {}
    size, claimed = path.stat().st_size, 0
    for name, value in pairs:
        where = f"{path.name!r}: {name}"
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise AdapterError(f"{where} is not a plain tensor: save only the adapter's tensors")
        if value.dtype not in FLOATS or value.numel() == 0:
            raise AdapterError(
                f"{where} has dtype {value.dtype} and shape {tuple(value.shape)}; expected a "
                "floating-point tensor that is not empty: save it as torch.float32"
            )
        # expanded views claim gigabytes that the file does not hold
        claimed += value.numel() * value.element_size()
        if claimed > size:
            raise AdapterError(
                f"{path.name!r}: the tensors up to {name} claim {claimed:,} bytes, the file has "
                f"{size:,}: {_ASK}"
            )
        tensors[name] = value.detach()
    return tensors
