"""Adapter files: where they lie, what is read of them and converted, and any bytes at all."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapter_cases import (
    DATA,
    forbid,
    one_tensor,
    pickled,
    refusal,
    refused,
    saved,
    tiny,
    written,
    zipped,
)
from dualdiff_engine import Engine, adapters
from dualdiff_engine.adapters import files
from dualdiff_engine.errors import AdapterError, OutputError


def _link(path: Path, target: str | Path) -> Path:
    path.symlink_to(target)
    return path


def _fifo(folder: Path) -> Path:
    os.mkfifo(folder / "a.safetensors")
    return folder / "a.safetensors"


def _folder(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir()
    return folder


PATHS = {
    "nothing-there": (lambda f: f / "a.safetensors", "no adapter at .*a.safetensors.*check"),
    "nul-in-the-path": (lambda f: f / "a\0.safetensors", "no adapter at .*check the path"),
    "name-too-long": (lambda f: f / ("a" * 300 + ".bin"), "cannot be read .File name too long"),
    "file-as-folder": (lambda f: written(f / "x") / "a.bin", "no adapter at .*check the path"),
    "empty-folder": (lambda f: f, "no adapter in folder.*; expected pytorch_lora_weights.safe"),
    "folder-of-checkpoints": (
        lambda f: _folder(f, "checkpoint-500", "checkpoint-1000", "checkpoint-5"),
        "it holds checkpoint-1000, checkpoint-500, checkpoint-5: pass one of them",
    ),
    "folder-named-safetensors": (
        lambda f: _folder(f, "a.safetensors") / "a.safetensors",
        "no adapter in folder .*a.safetensors'; expected",
    ),
    "folder-in-the-weights-place": (
        lambda f: _folder(f, "pytorch_lora_weights.safetensors"),
        "not a regular file: pass a .safetensors",
    ),
    "dangling-link": (lambda f: _link(f / "a.safetensors", f / "gone"), "no adapter at .*check"),
    "link-to-itself": (lambda f: _link(f / "a.bin", "a.bin"), "no adapter at .*check the path"),
    "device": (lambda f: Path("/dev/zero"), "/dev/zero' is not a regular file: pass a"),
    "link-to-a-device": (lambda f: _link(f / "a.safetensors", "/dev/zero"), "not a regular file"),
    "fifo": (_fifo, "not a regular file: pass a .safetensors"),
    "text-file": (
        lambda f: written(f / "a.txt"), "a.txt' is neither .safetensors nor .bin: rename"
    ),
    "checkpoint": (lambda f: written(f / "a.ckpt"), "a.ckpt' is neither .safetensors nor .bin"),
    "no-suffix": (lambda f: written(f / "adapter"), "adapter' is neither .safetensors nor .bin"),
    "control-characters": (
        lambda f: written(f / "a\n\x1b[2J.txt"), r"a\\n\\x1b\[2J.txt' is neither"
    ),
    "empty-safetensors": (lambda f: written(f / "a.safetensors", b""), "'a.safetensors' is empty"),
    "empty-bin": (lambda f: written(f / "a.bin", b""), "'a.bin' is empty: copy it again"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "match"), PATHS.values(), ids=PATHS)
def test_wrong_paths_are_refused(tmp_path: Path, make: Callable[[Path], Path], match: str) -> None:
    refused(make(tmp_path), match)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_huge_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = written(tmp_path / f"a{suffix}")
    os.truncate(path, files.MAX_FILE_BYTES + 1)
    forbid(monkeypatch, Path, "open")
    refused(path, f"'a{suffix}' has 3,221,225,473 bytes; an adapter has at most 3,221,225,472")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = written(tmp_path / name)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, f"{name}' cannot be read .Permission denied.: check the path and its permissions")


def test_a_failing_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "load_file", broken)
    refused(saved(tmp_path, tiny()), "cannot be read .Input/output error")


def test_a_pickle_is_refused_with_a_command_that_works(tmp_path: Path) -> None:
    folder = tmp_path / "it's $(touch ran) here"
    folder.mkdir()
    path = pickled(folder, tiny(), "pytorch_lora_weights.bin")
    with pytest.raises(AdapterError) as caught:
        adapters.load(folder)
    command = str(caught.value).splitlines()[1].strip()
    target = path.with_suffix(".safetensors")
    assert shlex.split(command) == ["dualdiff", "convert", str(path), str(target)]
    converted = adapters.convert(*shlex.split(command)[2:])
    assert adapters.load(folder).sha256 == converted.sha256
    with pytest.raises(
        AdapterError, match=r"is a pickle.*\n    dualdiff convert .*\n.*allow_pickle"
    ):
        Engine.from_pretrained(tmp_path / "no-base", adapter=path, device="cpu")


def test_a_plain_path_needs_no_quotes(tmp_path: Path) -> None:
    path = pickled(tmp_path, tiny())
    command = f"\n    dualdiff convert {path} {tmp_path}/a.safetensors\n"
    refused(path, re.escape(command), allow_pickle=False)


@pytest.mark.parametrize("case", ["dual", "bcm"])
def test_file_folder_and_checkpoint_are_the_same(tmp_path: Path, case: str) -> None:
    source = DATA / case / "adapter"
    inside = tmp_path / "run" / "checkpoint-500" / "pytorch_lora_weights.safetensors"
    converted = adapters.convert(source, inside)
    assert adapters.load(inside).sha256 == converted.sha256
    assert adapters.load(inside.parent).sha256 == converted.sha256
    assert adapters.load(str(inside.parent)).source == str(inside)
    refused(tmp_path / "run", "it holds checkpoint-500: pass one of them")
    by_pickle = adapters.load(source, allow_pickle=True)
    assert by_pickle.sha256 != converted.sha256
    assert by_pickle.source == str(source / "pytorch_lora_weights.bin")


def test_a_folder_prefers_safetensors(tmp_path: Path) -> None:
    written(tmp_path / "pytorch_lora_weights.bin")
    saved(tmp_path, tiny(), "pytorch_lora_weights.safetensors")
    assert adapters.load(tmp_path, allow_pickle=True).source.endswith(".safetensors")


def test_a_link_to_an_adapter_is_followed(tmp_path: Path) -> None:
    path = saved(tmp_path, tiny())
    assert adapters.load(_link(tmp_path / "b.safetensors", path)).rank == 2


@pytest.mark.parametrize("case", ["dual", "bcm"])
def test_conversion_keeps_every_bit(tmp_path: Path, case: str) -> None:
    source = DATA / case / "adapter" / "pytorch_lora_weights.bin"
    before = torch.load(source, weights_only=True)
    adapters.convert(source, tmp_path / "a.safetensors")
    after = files.read(tmp_path / "a.safetensors")
    assert sorted(after) == sorted(before)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_conversion_of_views_into_one_storage(tmp_path: Path) -> None:
    pool = torch.randn(4096)
    start, views = 0, {}
    for name, tensor in tiny().items():
        views[name] = pool[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    source = pickled(tmp_path, views)
    adapters.convert(source, tmp_path / "b.safetensors")
    after = files.read(tmp_path / "b.safetensors")
    assert all(torch.equal(after[name], view) for name, view in views.items())


def test_conversion_of_one_tensor_under_two_names(tmp_path: Path) -> None:
    tied = {name.replace("lora.1.", "lora.0."): tensor for name, tensor in tiny().items()}
    tensors = {name: tied[name.replace("lora.1.", "lora.0.")] for name in tiny()}
    adapter = adapters.convert(pickled(tmp_path, tensors), tmp_path / "b.safetensors")
    for site in adapter.sites.values():
        assert torch.equal(site.lora[0]["q"].up, site.lora[1]["q"].up)


def test_conversion_refuses_what_loading_refuses(tmp_path: Path) -> None:
    source = pickled(tmp_path, {"w": torch.ones(1)})
    target = tmp_path / "b.safetensors"
    refusal(lambda: adapters.convert(source, target), "^w is not part of")
    assert not target.exists()


def test_conversion_to_another_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"b\.bin' must end in \.safetensors"):
        adapters.convert(pickled(tmp_path, tiny()), tmp_path / "b.bin")


@pytest.mark.parametrize("target", ["a.bin/b.safetensors", "taken.safetensors"])
def test_conversion_to_no_place_is_an_output_error(tmp_path: Path, target: str) -> None:
    source = pickled(tmp_path, tiny())
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OutputError, match=f"{target} cannot be written .*choose another place"):
        adapters.convert(source, tmp_path / target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "taken.safetensors"]


@pytest.mark.parametrize(
    "wrap",
    [
        OrderedDict,
        lambda tensors: {name: nn.Parameter(t) for name, t in tensors.items()},
        lambda tensors: {name: t.clone().requires_grad_() for name, t in tensors.items()},
        lambda tensors: {name: torch._neg_view(-t) for name, t in tensors.items()},
        lambda tensors: {
            name: t.mT.clone().mT if t.dim() > 1 else t for name, t in tensors.items()
        },
    ],
    ids=["ordered-dict", "parameters", "with-gradient", "negated-views", "column-major"],
)
def test_what_torch_saves_of_plain_tensors_is_read(
    tmp_path: Path, wrap: Callable[[dict[str, torch.Tensor]], Any]
) -> None:
    path = pickled(tmp_path, wrap(tiny()))
    read = files.read(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tiny().items())
    assert not any(tensor.requires_grad for tensor in read.values())
    adapters.convert(path, tmp_path / "b.safetensors")
    again = files.read(tmp_path / "b.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tiny().items())


def test_metadata_of_a_state_dict_is_read(tmp_path: Path) -> None:
    content = OrderedDict(tiny())
    content._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    assert adapters.load(pickled(tmp_path, content), allow_pickle=True).rank == 2


def _load_or_refuse(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / f"a{suffix}", content)
        with suppress(AdapterError):
            adapters.load(path, allow_pickle=True)


def _valid(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write = saved if suffix == ".safetensors" else pickled
        return write(Path(folder), tiny(), f"a{suffix}").read_bytes()


VALID = {suffix: _valid(suffix) for suffix in (".safetensors", ".bin")}
BYTES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", VALID)
@settings(max_examples=200, derandomize=True, deadline=None)
@given(changes=BYTES)
def test_changed_bytes_load_or_are_refused(suffix: str, changes: list[tuple[float, int]]) -> None:
    content = bytearray(VALID[suffix])
    for where, byte in changes:
        # squared: most changes into the first third, where headers are
        content[int(where * where * (len(content) - 1))] = byte
    _load_or_refuse(bytes(content), suffix)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, derandomize=True, deadline=None)
@given(where=st.integers(0, len(one_tensor())), opcodes=st.binary(min_size=1, max_size=20))
def test_spliced_pickles_load_or_are_refused(where: int, opcodes: bytes) -> None:
    """Random opcodes into a valid program, inside a valid archive."""
    sound = one_tensor()
    with tempfile.TemporaryDirectory() as folder:
        path = zipped(Path(folder) / "a.bin", sound[:where] + opcodes + sound[where:])
        _load_or_refuse(path.read_bytes(), ".bin")
