"""What was measured on this machine, in the user's cache folder: one small file per batch class.

A file holds for one device, driver, set of versions, model shape, kind of dtype and batch class.
Whatever else is found in its place is ignored with a note: the engine then takes its usual choice.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FORMAT = 1
# what limits the instructions that libraries and the C++ kernels use
LIMITS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "DUALDIFF_NATIVE_ISA")
PACKAGES = ("dualdiff-engine", "torch", "triton", "xformers")


def folder() -> Path:
    """$DUALDIFF_CACHE, else dualdiff-engine in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("DUALDIFF_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dualdiff-engine"


def batch_class(batch: int) -> int:
    """The nearest power of two."""
    return int(2 ** round(math.log2(batch)))


@functools.cache
def driver(device_type: str) -> str:
    """Of the GPU, as its kernel module says; of a CPU, the instructions that PyTorch uses."""
    if device_type == "cpu":
        # the libraries can be told to use fewer than the processor has
        limits = [os.environ.get(x, "") for x in LIMITS]
        return " ".join([torch.backends.cpu.get_cpu_capability(), *filter(None, limits)])
    with suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text("utf-8").splitlines()[0]
    return str(torch.version.cuda)


@functools.cache
def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(x for x in lines if x.startswith("model name")).partition(": ")[2]
    return f"{name}, {torch.get_num_threads()} threads"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@dataclass(frozen=True)
class Key:
    """What a measurement holds for. model: a digest of the network's shapes."""

    device: str
    driver: str
    versions: str
    model: str
    # fp16 and bf16 share: their kernels differ in the type of a product alone
    dtype: str

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, model: object) -> Key:
        """model: anything whose `repr` tells its shapes."""
        return cls(
            device=device_name(device),
            driver=driver(device.type),
            versions=json.dumps(_versions(), sort_keys=True),
            model=hashlib.sha256(repr(model).encode()).hexdigest(),
            dtype="half" if dtype.itemsize == 2 else str(dtype).removeprefix("torch."),
        )

    @property
    def digest(self) -> str:
        facts = json.dumps(vars(self), sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _path(key: Key, batch: int) -> Path:
    return folder() / f"{key.digest}-b{batch_class(batch)}.json"


@dataclass(frozen=True)
class Record:
    """What was measured for a batch class.

    choices: "op@class" -> backend. places: "plain" and "background" -> place of the network -> the
    calls "op@class" that it makes. seconds: "op@class" -> backend -> seconds.
    """

    choices: Mapping[str, str]
    places: Mapping[str, Mapping[str, Sequence[str]]]
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def write(key: Key, batch: int, record: Record) -> Path:
    """Keep the record of a batch class: a whole file or none, whoever else writes one.

    Raises OSError.
    """
    path = _path(key, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"format": FORMAT, "key": vars(key), "batch": batch_class(batch), **asdict(record)}
    # of its own name: another process may write the same one now
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read(key: Key, batch: int) -> Record | None:
    """The record of the nearest batch class that was measured, or None."""
    names = folder().glob(f"{key.digest}-b*.json")
    sizes = {path: path.stem.rpartition("-b")[2] for path in names}
    known = {path: int(size) for path, size in sizes.items() if size.isdecimal() and int(size)}
    for path in sorted(known, key=lambda p: (abs(math.log2(known[p] / batch)), known[p])):
        if (record := _read(path, key)) is not None:
            return record
    return None


def _read(path: Path, key: Key) -> Record | None:
    try:
        content = json.loads(path.read_text("utf-8"))
        record = Record(content["choices"], content["places"], content["seconds"])
        words = [x for pair in record.choices.items() for x in pair]
        words += [
            name for kind in record.places.values() for calls in kind.values() for name in calls
        ]
        ours = content["format"] == FORMAT and content["key"] == vars(key)
        if ours and all(isinstance(x, str) for x in words):
            return record
        problem = "it is another machine's, or another version's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"it is damaged: {type(error).__name__}"
    logger.warning("%s is ignored (%s): run dualdiff tune again", path, problem)
    return None
