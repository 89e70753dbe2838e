"""Safetensors from strangers: headers that lie are refused by name, before a tensor is read."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import pytest
import torch

from adapter_cases import (
    DATA,
    entry,
    forbid,
    refused,
    safetensors,
    tiny,
    written,
)
from dualdiff_engine import adapters
from dualdiff_engine.adapters import files

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


FITS = "has shape .* which do not match: the file is cut off or damaged, copy it again"
LACKS = "'a.safetensors': w has no dtype, shape or data_offsets"
FLOAT = "w has dtype .*; adapters hold floating-point tensors only: save it as F32"

# refused from the header alone
HEADERS: dict[str, tuple[bytes, str]] = {
    "seven-bytes": (b"1234567", "cut off after 7 bytes: copy it again"),
    "length-and-no-header": (struct.pack("<Q", 100), r"invalid header \(100 bytes in a file of 8"),
    "length-zero": (struct.pack("<Q", 0), READABLE),
    "length-past-the-end": (safetensors({}, length=99), r"header \(99 bytes in a file of 10"),
    "length-one-past": (safetensors({}, length=3), r"invalid header \(3 bytes in a file of 10"),
    "length-2^63": (safetensors({}, length=2**63), r"header \(9,223,372,036,854,775,808 bytes"),
    "length-2^64-1": (safetensors({}, length=2**64 - 1), r"header \(18,446,744,073,709,551,615"),
    "length-cuts-the-json": (safetensors({"w": entry()}, length=20), READABLE),
    "header-of-5-MB": (safetensors(b" " * (5 << 20)), r"invalid header \(5,242,880 bytes"),
    "web-page": (b"<!DOCTYPE html><html>404", "has an invalid header .*copy the file again"),
    "git-lfs-pointer": (b"version https://git-lfs.github.com/spec/v1\n", "has an invalid header"),
    "pickle": (the_pickle(), "has an invalid header .*rename it to .bin if it is a pickle"),
    "not-json": (safetensors(b"{'w': 1}"), READABLE),
    "not-utf-8": (safetensors(b'{"\xff\xfe": 1}'), READABLE),
    "cut-json": (safetensors(b'{"w": {"dtype": "F32"'), READABLE),
    "json-list": (safetensors([entry()]), "is not a JSON object: copy the file again"),
    "json-number": (safetensors(b"1e400"), "is not a JSON object"),
    "json-null": (safetensors(b"null"), "is not a JSON object"),
    "json-huge-number": (safetensors(b'{"w": ' + b"9" * 10_000 + b"}"), READABLE),
    "json-deep-lists": (safetensors(b"[" * 200_000), READABLE),
    "json-deep-objects": (safetensors(b'{"w":' * 200_000), READABLE),
    "name-twice": (safetensors(b'{"w": {}, "w": {}}'), f"{READABLE} .'w' occurs twice"),
    "field-twice": (
        safetensors(b'{"w": {"dtype": "I8", "dtype": "F32"}}'), "'dtype' occurs twice"
    ),
    "million-names-twice": (
        safetensors(b'{"a":0,' + b",".join(b'"%x":0' % n for n in range(300_000)) + b"}"),
        "'a' occurs twice",
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
    "dtype-unknown": (with_entry(dtype="Q4_K"), "w has dtype 'Q4_K'; adapters hold floating-point"),
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
    "tensors-8193": (many(8193), "holds 8,193 tensors; an adapter has at most 8,192"),
    "tensors-100000": (many(100_000), "has an invalid header"),
    "name-empty": (with_name(""), "invalid name, '': check that it is the right file"),
    "name-of-10-kB": (with_name("w" * 10_000), "invalid name, 'w{80}': check that it is"),
    "name-with-escapes": (with_name("\x1b[2J\r\n"), r"invalid name, '\\x1b\[2J\\r\\n'"),
    "name-with-nul": (with_name("unet\0"), r"invalid name, 'unet\\x00'"),
    "name-of-a-path": (with_name("../../etc/passwd"), "invalid name, '../../etc/passwd'"),
    "name-with-newline-last": (with_name("unet.w\n"), r"invalid name, 'unet.w\\n'"),
    "name-in-unicode": (with_name("ünet.w"), "invalid name, 'ünet.w'"),
    "name-of-a-lone-surrogate": (with_name("\ud800"), r"invalid name, '\\ud800'"),
}  # fmt: skip

# valid words that leave bytes of the file to nobody or to two; found when the file is opened
PLACES: dict[str, tuple[bytes, str]] = {
    "overlap": (
        safetensors({"v": entry(), "w": entry(data_offsets=[4, 12])}, b"\0" * 12), "offset.*copy"
    ),
    "same-place": (safetensors({"v": entry(), "w": entry()}, EIGHT), "offset.*copy it again"),
    "hole": (
        safetensors({"v": entry(), "w": entry(data_offsets=[12, 20])}, b"\0" * 20), "offset.*copy"
    ),
    "hole-first": (safetensors({"w": entry(data_offsets=[4, 12])}, b"\0" * 12), "offset.*copy"),
    "data-left-over": (safetensors({"w": entry()}, b"\0" * 9), "not a valid safetensors file"),
    "metadata-of-numbers": (
        safetensors({"__metadata__": {"a": 1}, "w": entry()}, EIGHT), "not a valid safetensors"
    ),
    "metadata-list": (safetensors({"__metadata__": [], "w": entry()}, EIGHT), "not a valid safe"),
    "no-tensors": (safetensors({}), "holds no tensors: check that it is the right file"),
    "metadata-alone": (safetensors({"__metadata__": {"a": "b"}}), "holds no tensors"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("content", "match"), HEADERS.values(), ids=HEADERS)
def test_header_lies_are_refused_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, match: str
) -> None:
    forbid(monkeypatch, files, "load_file")
    refused(written(tmp_path / "a.safetensors", content), match)


@pytest.mark.parametrize(("content", "match"), PLACES.values(), ids=PLACES)
def test_unsound_safetensors_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    refused(written(tmp_path / "a.safetensors", content), match)


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
        refused(path, "copy (it|the file) again")
