"""Weights of a safetensors file or of shards, compared with what a network needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualdiff_engine.base_model.folder import blamed_on, check_file, first_line, read_json
from dualdiff_engine.errors import BaseModelError

_FLOATS = ("F64", "F32", "F16", "BF16")


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file or of shards, each read when asked for and not kept.

    path: the file, or the `.index.json` that names its shards. rename: name in the file -> name
    here, None for tensors that nothing reads. Raises BaseModelError.
    """

    def __init__(self, path: Path, rename: Callable[[str], str | None] = lambda name: name) -> None:
        self.path = path
        # name -> (file, name in it, shape, dtype)
        self._places: dict[str, tuple[Path, str, tuple[int, ...], str]] = {}
        for file, wanted in _shards(path).items():
            self._read_header(file, wanted, rename)
        self._files: dict[Path, Any] = {}
        self._finite: set[str] = set()

    def _read_header(
        self, path: Path, wanted: set[str] | None, rename: Callable[[str], str | None]
    ) -> None:
        check_file(path)
        try:
            with safe_open(path, "pt") as file:
                own = set(file.keys())
                for stored in sorted(own if wanted is None else own & wanted):
                    part = file.get_slice(stored)
                    name = rename(stored)
                    if name in self._places:
                        raise BaseModelError(f"{path} holds {name} twice: use an intact copy")
                    if name is not None:
                        shape = tuple(part.get_shape())
                        self._places[name] = path, stored, shape, str(part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise BaseModelError(
                f"{path} is not a valid safetensors file ({first_line(error)}): download it again"
            ) from error
        if lacking := sorted((wanted or set()) - own):
            raise BaseModelError(f"{path} lacks {_some(lacking)}: download it again")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._places:
            raise BaseModelError(
                f"{self.path} has no tensor {name}: the base model is incomplete, download it again"
            )
        path, stored, _, dtype = self._places[name]
        if dtype not in _FLOATS:
            raise BaseModelError(_not_float(self.path, name, dtype))
        with blamed_on(path):
            # opened once: every opening reads the whole header
            if path not in self._files:
                self._files[path] = safe_open(path, "pt")
            tensor: Tensor = self._files[path].get_tensor(stored)
        if name not in self._finite:
            if not bool(torch.isfinite(tensor).all()):
                raise BaseModelError(
                    f"{path}: {name} holds NaN or infinity: the file is damaged, download it again"
                )
            self._finite.add(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, read from the header alone."""
        return self._places[name][2]

    def dtype(self, name: str) -> str:
        """A tensor's dtype as safetensors names it, such as F16."""
        return self._places[name][3]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse what is missing, what is too much, other shapes, and what is not floating point.

        expected: shapes by name. Raises BaseModelError naming the tensors.
        """
        if missing := sorted(expected.keys() - self._places.keys()):
            raise BaseModelError(f"{self.path} lacks {_some(missing)}: download it again")
        if extra := sorted(self._places.keys() - expected.keys()):
            raise BaseModelError(
                f"{self.path} holds {_some(extra)}, which do not belong to the network of its "
                "config.json: use the two files of one model"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise BaseModelError(
                    f"{self.path}: {name} has shape {list(self.shape(name))}, by its config.json "
                    f"it should have {list(shape)}: use the two files of one model"
                )
            if self.dtype(name) not in _FLOATS:
                raise BaseModelError(_not_float(self.path, name, self.dtype(name)))


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files, each with the names it has to hold; None stands for all that lie there."""
    if path.suffix != ".json":
        return {path: None}
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise BaseModelError(f"{path} has no weight_map: download it again")
    files: dict[Path, set[str] | None] = {}
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise BaseModelError(
                f"{path} names {str(file)[:80]!r}, which is not a file beside it: download it again"
            )
        names = files.setdefault(path.parent / file, set())
        assert names is not None
        names.add(name)
    return files


def _some(names: list[str]) -> str:
    """A few names, and how many there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"


def _not_float(path: Path, name: str, dtype: str) -> str:
    return (
        f"{path}: {name} has dtype {dtype}; the engine reads {', '.join(_FLOATS)}: save the model "
        "in float16 or float32"
    )
