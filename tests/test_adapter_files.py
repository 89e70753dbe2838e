"""Adapter files from strangers: wrong ones are refused by name, and nothing in them runs."""

from __future__ import annotations

import io
import os
import re
import shlex
import struct
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adapter_cases import (
    DATA,
    PAYLOADS,
    Payload,
    entry,
    hide_alone,
    hide_before_a_zip,
    hide_in_attribute,
    hide_in_gzip,
    hide_in_key,
    hide_in_legacy,
    hide_in_nested,
    hide_in_protocol_0,
    hide_in_protocol_4,
    hide_in_raw,
    hide_in_second_pickle,
    hide_in_swapped,
    hide_in_tar,
    hide_in_value,
    one_tensor,
    pickled,
    refusal,
    refused,
    safetensors,
    saved,
    tensor_ops,
    text_op,
    tiny,
    zipped,
)
from dualdiff_engine import Engine, adapter_files, adapters
from dualdiff_engine.errors import AdapterError, OutputError


def forbid(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    def called(*_: object, **__: object) -> None:
        raise AssertionError(f"{name} was reached")

    monkeypatch.setattr(owner, name, called)


# --- paths ---------------------------------------------------------------------------------------


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


def _file(path: Path, content: bytes = b"hello") -> Path:
    path.write_bytes(content)
    return path


PATHS = {
    "nothing-there": (lambda f: f / "a.safetensors", "no adapter at .*a.safetensors.*check"),
    "nul-in-the-path": (lambda f: f / "a\0.safetensors", "no adapter at .*check the path"),
    "name-too-long": (lambda f: f / ("a" * 300 + ".bin"), "cannot be read .File name too long"),
    "file-as-folder": (lambda f: _file(f / "x") / "a.bin", "no adapter at .*check the path"),
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
    "text-file": (lambda f: _file(f / "a.txt"), "a.txt' is neither .safetensors nor .bin: rename"),
    "checkpoint": (lambda f: _file(f / "a.ckpt"), "a.ckpt' is neither .safetensors nor .bin"),
    "no-suffix": (lambda f: _file(f / "adapter"), "adapter' is neither .safetensors nor .bin"),
    "control-characters": (lambda f: _file(f / "a\n\x1b[2J.txt"), r"a\\n\\x1b\[2J.txt' is neither"),
    "empty-safetensors": (lambda f: _file(f / "a.safetensors", b""), "'a.safetensors' is empty"),
    "empty-bin": (lambda f: _file(f / "a.bin", b""), "'a.bin' is empty: copy it again"),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize(("make", "match"), PATHS.values(), ids=PATHS)
def test_wrong_paths_are_refused(tmp_path: Path, make: Callable[[Path], Path], match: str) -> None:
    refused(make(tmp_path), match)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_huge_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = _file(tmp_path / f"a{suffix}")
    os.truncate(path, adapter_files.MAX_FILE_BYTES + 1)
    forbid(monkeypatch, Path, "open")
    refused(path, f"'a{suffix}' has 3,221,225,473 bytes; an adapter has 3,221,225,472 at most")


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin"])
def test_a_file_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = _file(tmp_path / name)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    refused(path, f"{name}' cannot be read .Permission denied.: check the path and its permissions")


def test_a_failing_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(adapter_files, "load_file", broken)
    refused(saved(tmp_path, tiny()), "cannot be read .Input/output error")


# --- safetensors ---------------------------------------------------------------------------------

READABLE = "no readable safetensors header"
EIGHT = b"\0" * 8


def with_entry(**changes: object) -> bytes:
    return safetensors({"w": entry(**changes)}, EIGHT)


def with_name(name: str) -> bytes:
    return safetensors({name: entry()}, EIGHT)


def many(count: int) -> bytes:
    return safetensors(
        {f"w{n}": entry(shape=[1], data_offsets=[4 * n, 4 * n + 4]) for n in range(count)},
        b"\0" * 4 * count,
    )


def the_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save(tiny(), buffer)
    return buffer.getvalue()


FITS = "claims shape .* which does not fit: the file is cut off or damaged, copy it again"
LACKS = "'a.safetensors': w lacks dtype, shape or data_offsets"
FLOAT = "w is .*; adapters hold floating point only: save it as F32"

# refused from the header alone
HEADERS: dict[str, tuple[bytes, str]] = {
    "seven-bytes": (b"1234567", "cut off after 7 bytes: copy it again"),
    "length-and-no-header": (struct.pack("<Q", 100), "a header of 100 bytes in a file of 8"),
    "length-zero": (struct.pack("<Q", 0), READABLE),
    "length-past-the-end": (safetensors({}, length=99), "a header of 99 bytes in a file of 10"),
    "length-one-past": (safetensors({}, length=3), "a header of 3 bytes in a file of 10"),
    "length-2^63": (safetensors({}, length=2**63), "a header of 9,223,372,036,854,775,808 bytes"),
    "length-2^64-1": (safetensors({}, length=2**64 - 1), "a header of 18,446,744,073,709,551,615"),
    "length-cuts-the-json": (safetensors({"w": entry()}, length=20), READABLE),
    "header-of-5-MB": (safetensors(b" " * (5 << 20)), "a header of 5,242,880 bytes"),
    "web-page": (b"<!DOCTYPE html><html>404", "claims a header of .*damaged, copy it again"),
    "git-lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "claims a header of"),
    "pickle": (the_pickle(), "claims a header of .*renamed pickle, which must end in .bin"),
    "not-json": (safetensors(b"{'w': 1}"), READABLE),
    "not-utf-8": (safetensors(b'{"\xff\xfe": 1}'), READABLE),
    "cut-json": (safetensors(b'{"w": {"dtype": "F32"'), READABLE),
    "json-list": (safetensors([entry()]), "a header that is no JSON object: copy it again"),
    "json-number": (safetensors(b"1e400"), "a header that is no JSON object"),
    "json-null": (safetensors(b"null"), "a header that is no JSON object"),
    "json-huge-number": (safetensors(b'{"w": ' + b"9" * 10_000 + b"}"), READABLE),
    "json-deep-lists": (safetensors(b"[" * 200_000), READABLE),
    "json-deep-objects": (safetensors(b'{"w":' * 200_000), READABLE),
    "name-twice": (safetensors(b'{"w": {}, "w": {}}'), f"{READABLE} .'w' is there twice"),
    "field-twice": (
        safetensors(b'{"w": {"dtype": "I8", "dtype": "F32"}}'), "'dtype' is there twice"
    ),
    "million-names-twice": (
        safetensors(b'{"a":0,' + b",".join(b'"%x":0' % n for n in range(300_000)) + b"}"),
        "'a' is there twice",
    ),
    "entry-list": (safetensors({"w": ["F32", [2], [0, 8]]}, EIGHT), LACKS),
    "entry-string": (safetensors({"w": "F32"}, EIGHT), LACKS),
    "entry-null": (safetensors({"w": None}, EIGHT), LACKS),
    "no-dtype": (with_entry(dtype=None), LACKS),
    "no-shape": (with_entry(shape=None), LACKS),
    "no-offsets": (with_entry(data_offsets=None), LACKS),
    "dtype-I64": (with_entry(dtype="I64", shape=[1]), FLOAT),
    "dtype-U8": (with_entry(dtype="U8", shape=[8]), FLOAT),
    "dtype-BOOL": (with_entry(dtype="BOOL", shape=[8]), FLOAT),
    "dtype-C64": (with_entry(dtype="C64", shape=[1]), FLOAT),
    "dtype-F8": (with_entry(dtype="F8_E4M3", shape=[8]), FLOAT),
    "dtype-unknown": (with_entry(dtype="Q4_K"), "w is 'Q4_K'; adapters hold floating point only"),
    "dtype-lower-case": (with_entry(dtype="f32"), FLOAT),
    "dtype-list": (with_entry(dtype=["F32"]), FLOAT),
    "dtype-object": (with_entry(dtype={"F32": 4}), FLOAT),
    "dtype-number": (with_entry(dtype=32), FLOAT),
    "shape-string": (with_entry(shape="2"), FITS),
    "shape-number": (with_entry(shape=2), FITS),
    "shape-object": (with_entry(shape={"0": 2}), FITS),
    "shape-negative": (with_entry(shape=[-2]), FITS),
    "shape-both-negative": (with_entry(shape=[-1, -2]), FITS),
    "shape-float": (with_entry(shape=[2.0]), FITS),
    "shape-nan": (with_entry(shape=[float("nan")]), FITS),
    "shape-bool": (with_entry(shape=[2, True]), FITS),
    "shape-nested": (with_entry(shape=[[2]]), FITS),
    "shape-zero": (with_entry(shape=[0], data_offsets=[0, 0]), FITS),
    "shape-2^62": (with_entry(shape=[2**62]), FITS),
    "shape-wraps-to-two": (with_entry(shape=[2**33, 2**31 + 1]), FITS),
    "shape-of-9-dims": (with_entry(shape=[1] * 8 + [2]), FITS),
    "shape-of-a-million-dims": (with_entry(shape=[8] * 1_000_000), FITS),
    "shape-beyond-the-place": (with_entry(shape=[3]), FITS),
    "shape-below-the-place": (with_entry(shape=[1]), FITS),
    "dtype-beyond-the-place": (with_entry(dtype="F64"), FITS),
    "offsets-negative": (with_entry(data_offsets=[-8, 0]), FITS),
    "offsets-swapped": (with_entry(data_offsets=[8, 0]), FITS),
    "offsets-past-the-end": (with_entry(data_offsets=[8, 16]), FITS),
    "offsets-2^64": (with_entry(data_offsets=[2**64, 2**64 + 8]), FITS),
    "offsets-one": (with_entry(data_offsets=[8]), FITS),
    "offsets-three": (with_entry(data_offsets=[0, 8, 8]), FITS),
    "offsets-floats": (with_entry(data_offsets=[0.0, 8.0]), FITS),
    "offsets-bools": (with_entry(shape=[1], data_offsets=[False, 4]), FITS),
    "offsets-strings": (with_entry(data_offsets=["0", "8"]), FITS),
    "data-cut": (safetensors({"w": entry()}, EIGHT[:7]), FITS),
    "data-gone": (safetensors({"w": entry()}), FITS),
    "tensors-8193": (many(8193), "holds 8,193 tensors; an adapter has 8,192 at most"),
    "tensors-100000": (many(100_000), "claims a header of"),
    "name-empty": (with_name(""), "unusable name, '': check that it is the right file"),
    "name-of-10-kB": (with_name("w" * 10_000), "unusable name, 'w{80}': check that it is"),
    "name-with-escapes": (with_name("\x1b[2J\r\n"), r"unusable name, '\\x1b\[2J\\r\\n'"),
    "name-with-nul": (with_name("unet\0"), r"unusable name, 'unet\\x00'"),
    "name-of-a-path": (with_name("../../etc/passwd"), "unusable name, '../../etc/passwd'"),
    "name-with-newline-last": (with_name("unet.w\n"), r"unusable name, 'unet.w\\n'"),
    "name-in-unicode": (with_name("ünet.w"), "unusable name, 'ünet.w'"),
    "name-of-a-lone-surrogate": (with_name("\ud800"), r"unusable name, '\\ud800'"),
}  # fmt: skip

# sound words that leave bytes of the file to nobody or to two; found when the file is opened
PLACES: dict[str, tuple[bytes, str]] = {
    "overlap": (
        safetensors({"v": entry(), "w": entry(data_offsets=[4, 12])}, b"\0" * 12), "offset.*copy"
    ),
    "same-place": (safetensors({"v": entry(), "w": entry()}, EIGHT), "offset.*copy it again"),
    "hole": (
        safetensors({"v": entry(), "w": entry(data_offsets=[12, 20])}, b"\0" * 20), "offset.*copy"
    ),
    "hole-first": (safetensors({"w": entry(data_offsets=[4, 12])}, b"\0" * 12), "offset.*copy"),
    "data-left-over": (safetensors({"w": entry()}, b"\0" * 9), "not a sound safetensors file"),
    "metadata-of-numbers": (
        safetensors({"__metadata__": {"a": 1}, "w": entry()}, EIGHT), "not a sound safetensors"
    ),
    "metadata-list": (safetensors({"__metadata__": [], "w": entry()}, EIGHT), "not a sound safe"),
    "no-tensors": (safetensors({}), "holds no tensors: check that it is the right file"),
    "metadata-alone": (safetensors({"__metadata__": {"a": "b"}}), "holds no tensors"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("content", "match"), HEADERS.values(), ids=HEADERS)
def test_header_lies_are_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, match: str
) -> None:
    forbid(monkeypatch, adapter_files, "load_file")
    refused(_file(tmp_path / "a.safetensors", content), match)


@pytest.mark.parametrize(("content", "match"), PLACES.values(), ids=PLACES)
def test_unsound_safetensors_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(_file(tmp_path / "a.safetensors", content), match)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, suffix: str) -> None:
    source = DATA / "dual" / "adapter" / "pytorch_lora_weights.bin"
    path = tmp_path / f"a{suffix}"
    if suffix == ".bin":
        path.write_bytes(source.read_bytes())
    else:
        adapters.convert(source, path)
    size = path.stat().st_size
    for length in (size - 1, *range((size - 1) // 4096 * 4096, 0, -4096), 9, 8, 1):
        os.truncate(path, length)
        refused(path, "copy it again")


# --- pickles: nothing runs -----------------------------------------------------------------------


CALLS = "and was not opened: ask its author for .safetensors"
NOT_SAVED = "not what torch.save writes: copy it again; an old pickle"
HIDING: dict[str, tuple[Callable[[Payload, Path], object], str]] = {
    "top-level": (hide_alone, f"names .*{CALLS}"),
    "value": (hide_in_value, f"names .*{CALLS}"),
    "key": (hide_in_key, f"names .*{CALLS}"),
    "nested": (hide_in_nested, f"names .*{CALLS}"),
    "attribute": (hide_in_attribute, f"names .*{CALLS}"),
    "swapped-pickle": (hide_in_swapped, f"names .*{CALLS}"),
    "swapped-protocol-0": (hide_in_protocol_0, f"names .*{CALLS}"),
    "swapped-protocol-4": (hide_in_protocol_4, f"holds more than tensors {CALLS}"),
    "second-pickle": (hide_in_second_pickle, "not laid out as torch.save does .2 pickles"),
    "legacy": (hide_in_legacy, NOT_SAVED),
    "raw": (hide_in_raw, NOT_SAVED),
    "before-a-zip": (hide_before_a_zip, NOT_SAVED),
    "tar": (hide_in_tar, NOT_SAVED),
    "gzip": (hide_in_gzip, NOT_SAVED),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("hide", HIDING)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_in_a_pickle_runs(tmp_path: Path, payload: str, hide: str) -> None:
    marker, path = tmp_path / "ran", tmp_path / "a.bin"
    write, match = HIDING[hide]
    write(PAYLOADS[payload](marker), path)
    refused(path, match)
    refusal(lambda: adapters.convert(path, tmp_path / "b.safetensors"), match)
    refused(path, "is a pickle, which can run code when opened", allow_pickle=False)
    assert not marker.exists()
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_payloads_are_live(tmp_path: Path, payload: str) -> None:
    """The control: a careless reader does run them."""
    marker, path = tmp_path / "ran", tmp_path / "a.bin"
    hide_alone(PAYLOADS[payload](marker), path)
    torch.load(path, weights_only=False)
    assert marker.exists()


# programs that a careless reader, or weights_only alone, would run
OPCODES: dict[str, tuple[bytes, str]] = {
    "posix": (b"\x80\x02cposix\nsystem\n" + text_op("true") + b"\x85R.", "names 'posix.system'"),
    "nt": (b"\x80\x02cnt\nsystem\n" + text_op("true") + b"\x85R.", "names 'nt.system'"),
    "dotted": (b"\x80\x02ctorch\nserialization.os.system\n.", "names 'torch.serialization.os.sys"),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "names '__builtin__.getattr'"),
    "bytearray": (
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "names '__builtin__.bytearray'"
    ),
    "tensor-class": (b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "torch.FloatTensor"),
    "untyped-storage": (
        b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.", "storage.UntypedStorage"
    ),
    "storage-called": (b"\x80\x02ctorch\nFloatStorage\nK\x04\x85R.", "damaged .TypeError"),
    "subclass": (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n.", "_rebuild_from_type_v2'"),
    "long-global": (b"\x80\x02cos\n" + b"x" * 9999 + b"\n.", r"names 'os\.x{77}'"),
    "global-with-escapes": (b"\x80\x02cos\n\x1b[2J\n.", r"names 'os\.\\x1b\[2J'"),
    "inst": (b"(" + text_op("true") + b"ios\nsystem\n.", "holds more than tensors"),
    "extension": (b"\x80\x02\x82\x01.", "holds more than tensors|damaged"),
    "deep-tuple-as-key": (
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"K\x01s.", "holds 1,000,000 tuples, more than"
    ),
    "pickle-of-5-MB": (b"\x80\x02" + b"N0" * (5 << 19) + b"}.", "a pickle of 5,242,884 bytes"),
    "pickle-empty": (b"", "'a.bin' is damaged"),
    "pickle-without-end": (b"\x80\x02}", "'a.bin' is damaged"),
    "pickle-of-noise": (bytes(range(128, 256)), "'a.bin' is damaged"),
    "stack-underflow": (b"\x80\x02sss.", "'a.bin' is damaged"),
    "memo-missing": (b"\x80\x02h\x07.", "'a.bin' is damaged"),
    "storage-missing": (one_tensor(key="7"), "'a.bin' is damaged"),
    "storage-of-a-path": (one_tensor(key="../../../../etc/passwd"), "'a.bin' is damaged"),
    "storage-too-small": (one_tensor(numel=b"M\xe8\x03"), "'a.bin' is damaged"),
    "storage-of-2^56": (one_tensor(numel=b"\x8a\x08" + b"\0" * 7 + b"\x01"), "'a.bin' is damaged"),
    "storage-negative": (one_tensor(numel=b"J\xff\xff\xff\xff"), "'a.bin' is damaged"),
    "view-past-the-storage": (one_tensor(offset=b"K\x02"), "'a.bin' is damaged"),
    "view-before-the-storage": (one_tensor(offset=b"J\xff\xff\xff\xff"), "'a.bin' is damaged"),
    "stride-negative": (one_tensor(strides=b"J\xff\xff\xff\xff\x85"), "'a.bin' is damaged"),
    "stride-past-the-storage": (one_tensor(strides=b"K\x02\x85"), "'a.bin' is damaged"),
    "shape-negative": (one_tensor(shape=b"J\xff\xff\xff\xff\x85"), "'a.bin' is damaged"),
    "stride-0-terabytes": (
        one_tensor(shape=b"\x8a\x06\0\0\0\0\0\x01\x85", strides=b"K\x00\x85"),
        "w brings the tensors to 4,398,046,511,104 bytes in a file of",
    ),
    "stride-0-overflows": (
        one_tensor(shape=b"\x8a\x08" + b"\0" * 7 + b"\x40\x85", strides=b"K\x00\x85"),
        "w brings the tensors to 18,446,744,073,709,551,616 bytes",
    ),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("program", "match"), OPCODES.values(), ids=OPCODES)
def test_hostile_programs_are_refused(tmp_path: Path, program: bytes, match: str) -> None:
    refused(zipped(tmp_path / "a.bin", program), match)


def test_torch_never_sees_a_pickle_that_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`weights_only` is the wall; what anybody allowlisted in this process is no hole in ours."""
    forbid(monkeypatch, torch, "load")
    refused(zipped(tmp_path / "a.bin", OPCODES["bytearray"][0]), "names '__builtin__.bytearray'")


# --- pickles: archives ---------------------------------------------------------------------------


def _bomb(method: int) -> Callable[[Path], object]:
    return lambda path: zipped(path, one_tensor(), method=method, storage=b"\0" * (1 << 22))


def _rewritten(change: Callable[[bytearray], None]) -> Callable[[Path], object]:
    """A file of torch.save with bytes changed."""

    def write(path: Path) -> None:
        torch.save(tiny(), path)
        content = bytearray(path.read_bytes())
        change(content)
        path.write_bytes(content)

    return write


def _sizes_lie(content: bytearray) -> None:
    at = content.rindex(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 0x7FFF0000)


def _entries_overlap(path: Path) -> None:
    """A thousand names for the same kilobyte."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", b"\0" * 1024)
        first = archive.infolist()[0]
        for n in range(1000):
            again = zipfile.ZipInfo(f"archive/data/{n}")
            again.file_size = again.compress_size = first.file_size
            again.CRC, again.header_offset = first.CRC, first.header_offset
            archive.filelist.append(again)
    path.write_bytes(buffer.getvalue())


def _archive(*names: str, content: bytes = b"\x80\x02}.") -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, content)

    return write


def _encrypt(content: bytearray) -> None:
    content[6] |= 1
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1


LAYOUT = "'a.bin' is not laid out as torch.save does"
ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflate-bomb": (_bomb(zipfile.ZIP_DEFLATED), "unpacks to more than its own size: ask its"),
    "bzip2-bomb": (_bomb(zipfile.ZIP_BZIP2), "unpacks to more than its own size"),
    "lzma-bomb": (_bomb(zipfile.ZIP_LZMA), "unpacks to more than its own size"),
    "sizes-lie": (_rewritten(_sizes_lie), "unpacks to more than its own size"),
    "entries-overlap": (_entries_overlap, "unpacks to more than its own size"),
    "no-pickle": (_archive("archive/data/0"), f"{LAYOUT} .0 pickles"),
    "two-folders": (_archive("a/data.pkl", "b/data.pkl"), f"{LAYOUT} .2 pickles"),
    "file-twice": (_archive("a/data.pkl", "a/data/0", "a/data/0"), f"{LAYOUT} .1 pickles"),
    "file-in-both-cases": (_archive("a/data.pkl", "a/byteorder", "a/ByteOrder"), LAYOUT),
    "storage-of-many-spellings": (_archive("a/data.pkl", "a/data/aa"), LAYOUT),
    "storage-in-folders": (_archive("a/data.pkl", "a/data/a/data/0"), LAYOUT),
    "upward-folder": (_archive("../../data.pkl"), "'a.bin' is damaged"),
    "absolute-folder": (_archive("/tmp/data.pkl"), "'a.bin' is damaged|holds no tensors"),
    "jar": (_archive("META-INF/MANIFEST.MF"), f"{LAYOUT} .0 pickles"),
    "torchscript": (
        lambda path: zipped(path, b"\x80\x02}.", **{"constants.pkl": b"\x80\x02)."}),
        "'a.bin' is damaged",
    ),
    "byte-order-unknown": (_rewritten(lambda c: c.__setitem__(
        slice(c.index(b"little"), c.index(b"little") + 6), b"middle")), "'a.bin' is damaged"),
    "encrypted": (_rewritten(_encrypt), "'a.bin' is damaged"),
    "magic-alone": (lambda path: path.write_bytes(b"PK\x03\x04"), "'a.bin' is damaged"),
    "directory-gone": (
        _rewritten(lambda content: content.__delitem__(slice(-60, None))), "'a.bin' is damaged"
    ),
    "safetensors": (
        lambda path: saved(path.parent, tiny(), path.name), "renamed .safetensors named so"
    ),
    "text": (lambda path: path.write_bytes(b"hello"), NOT_SAVED),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip", "ignore:Duplicate name")
@pytest.mark.parametrize(("write", "match"), ARCHIVES.values(), ids=ARCHIVES)
def test_hostile_archives_are_refused(
    tmp_path: Path, write: Callable[[Path], object], match: str
) -> None:
    path = tmp_path / "a.bin"
    write(path)
    refused(path, match)


def test_paths_in_an_archive_are_never_written(tmp_path: Path) -> None:
    names = {"../ran": b"x", str(tmp_path / "ran"): b"x"}
    zipped(tmp_path / "a.bin", one_tensor(), **names)
    refused(tmp_path / "a.bin", "^w is not part of a DualAnoDiff adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


# --- pickles: contents ---------------------------------------------------------------------------


def _sparse(layout: str) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr("warnings.warn", lambda *_, **__: None)
        return getattr(torch.eye(4), f"to_sparse{layout}")()


FLAT = "'a.bin' is not a flat dict of named tensors: save only the adapter's tensors"
PLAIN = "'a.bin': w is not a plain tensor: save only the adapter's tensors"
KIND = "'a.bin': w is torch.{} of shape .*; expected floating point and some elements: save it"
ONE = torch.ones(4)
CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [ONE], FLAT),
    "tuple": (lambda: (ONE, ONE), FLAT),
    "tensor-alone": (lambda: ONE, FLAT),
    "none": (lambda: None, FLAT),
    "module": (lambda: nn.Linear(2, 2), f"names 'torch.nn.modules.linear.Linear'.*{CALLS}"),
    "number-keys": (lambda: {0: ONE}, FLAT),
    "bytes-keys": (lambda: {b"w": ONE}, f"names '_codecs.encode'|{FLAT}"),
    "tuple-keys": (lambda: {("w", 1): ONE}, FLAT),
    "nested": (lambda: {"w": {"lora": ONE}}, PLAIN),
    "nested-ordered": (lambda: {"w": OrderedDict(lora=ONE)}, PLAIN),
    "list-value": (lambda: {"w": [ONE]}, PLAIN),
    "string-value": (lambda: {"w": "unet"}, PLAIN),
    "number-value": (lambda: {"w": 1.0}, PLAIN),
    "none-value": (lambda: {"w": None}, PLAIN),
    "numpy-value": (lambda: {"w": np.ones(4)}, f"names 'numpy.*{CALLS}"),
    "dtype-value": (lambda: {"w": torch.float32}, f"names 'torch.float32'.*{CALLS}"),
    "empty": (dict, "'a.bin' holds no tensors: check that it is the right file"),
    "int": (lambda: {"w": ONE.long()}, KIND.format("int64")),
    "uint8": (lambda: {"w": ONE.byte()}, KIND.format("uint8")),
    "bool": (lambda: {"w": ONE.bool()}, KIND.format("bool")),
    "complex": (lambda: {"w": ONE.to(torch.complex64)}, KIND.format("complex64")),
    "float8": (lambda: {"w": ONE.to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn|names 'torch._"),
    "no-elements": (lambda: {"w": torch.ones(0, 4)}, KIND.format("float32")),
    "quantized": (
        lambda: {"w": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)},
        "names 'torch._utils._rebuild_qtensor'",
    ),
    "sparse-coo": (lambda: {"w": _sparse("")}, "names 'torch._utils._rebuild_sparse_tensor'"),
    "sparse-csr": (lambda: {"w": _sparse("_csr")}, "names 'torch._utils._rebuild_sparse_tensor'"),
    "meta": (lambda: {"w": torch.ones(4, device="meta")}, "names 'torch._utils._rebuild_meta"),
    "expanded": (
        lambda: {"w": torch.ones(1).expand(1 << 40)},
        "w brings the tensors to 4,398,046,511,104 bytes in a file of .*ask its author",
    ),
    "expanded-scalar": (
        lambda: {"w": torch.ones(()).expand(1 << 30, 1 << 20)},
        "w brings the tensors to 4,503,599,627,370,496 bytes",
    ),
    "expanded-slowly": (
        lambda: {f"w{n}": torch.ones(1).expand(999) for n in range(999)},
        "w[0-9]+ brings the tensors to",
    ),
    "too-many": (lambda: dict.fromkeys(map(str, range(8193)), ONE), "holds 8,193 tensors"),
    "unusable-name": (lambda: {"../w": ONE}, "an unusable name, '../w'"),
    "name-of-10-kB": (lambda: {"w" * 10_000: ONE}, "an unusable name, 'w{80}'"),
    "nan": (lambda: {"w": ONE * float("nan")}, "w holds NaN or infinity.*earlier checkpoint"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "match"), CONTENTS.values(), ids=CONTENTS)
def test_wrong_contents_are_refused(tmp_path: Path, make: Callable[[], Any], match: str) -> None:
    refused(pickled(tmp_path, make()), match)


def test_attributes_hung_on_a_dict_do_no_harm(tmp_path: Path) -> None:
    """`items = 5` on an OrderedDict is data that weights_only passes on."""
    program = (
        b"\x80\x02ccollections\nOrderedDict\n)R" + text_op("w") + tensor_ops() + b"s}"
        + text_op("items") + b"K\x05s" + text_op("keys") + b"K\x05sb."
    )  # fmt: skip
    refused(zipped(tmp_path / "a.bin", program), "^w is not part of a DualAnoDiff adapter")


# --- what is read --------------------------------------------------------------------------------


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
    _file(tmp_path / "pytorch_lora_weights.bin")
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
    after = adapter_files.read(tmp_path / "a.safetensors")
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
    after = adapter_files.read(tmp_path / "b.safetensors")
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
    with pytest.raises(OutputError, match=f"cannot write '.*{target}'.*choose another place"):
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
    read = adapter_files.read(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tiny().items())
    assert not any(tensor.requires_grad for tensor in read.values())
    adapters.convert(path, tmp_path / "b.safetensors")
    again = adapter_files.read(tmp_path / "b.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tiny().items())


def test_metadata_of_a_state_dict_is_read(tmp_path: Path) -> None:
    content = OrderedDict(tiny())
    content._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    assert adapters.load(pickled(tmp_path, content), allow_pickle=True).rank == 2


# --- any bytes -----------------------------------------------------------------------------------


def _load_or_refuse(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder) / f"a{suffix}", content)
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
    """Random opcodes into a sound program, inside a sound archive."""
    sound = one_tensor()
    with tempfile.TemporaryDirectory() as folder:
        path = zipped(Path(folder) / "a.bin", sound[:where] + opcodes + sound[where:])
        _load_or_refuse(path.read_bytes(), ".bin")
