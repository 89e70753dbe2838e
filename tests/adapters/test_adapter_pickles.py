"""Pickles from strangers: wrong ones are refused by name, and nothing in them runs."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adapter_cases import (
    PAYLOADS,
    Payload,
    forbid,
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
    saved,
    tensor_ops,
    text_op,
    tiny,
    zipped,
)
from dualdiff_engine import adapters

CALLS = "so it was not opened: ask the author for a .safetensors file"
NOT_SAVED = "was not written by torch.save: copy it again. If it is an old pickle"
HIDING: dict[str, tuple[Callable[[Payload, Path], object], str]] = {
    "top-level": (hide_alone, f"refers to .*{CALLS}"),
    "value": (hide_in_value, f"refers to .*{CALLS}"),
    "key": (hide_in_key, f"refers to .*{CALLS}"),
    "nested": (hide_in_nested, f"refers to .*{CALLS}"),
    "attribute": (hide_in_attribute, f"refers to .*{CALLS}"),
    "swapped-pickle": (hide_in_swapped, f"refers to .*{CALLS}"),
    "swapped-protocol-0": (hide_in_protocol_0, f"refers to .*{CALLS}"),
    "swapped-protocol-4": (hide_in_protocol_4, f"holds more than tensors, {CALLS}"),
    "second-pickle": (hide_in_second_pickle, "does not have the layout of torch.save .2 pickles"),
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
    "posix": (b"\x80\x02cposix\nsystem\n" + text_op("true") + b"\x85R.", "refers to 'posix.system"),
    "nt": (b"\x80\x02cnt\nsystem\n" + text_op("true") + b"\x85R.", "refers to 'nt.system'"),
    "dotted": (b"\x80\x02ctorch\nserialization.os.system\n.", "refers to 'torch.serialization.os."),
    "getattr": (b"\x80\x02c__builtin__\ngetattr\n.", "refers to '__builtin__.getattr'"),
    "bytearray": (
        b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "refers to '__builtin__.bytea"
    ),
    "tensor-class": (b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.", "torch.FloatTensor"),
    "untyped-storage": (
        b"\x80\x02ctorch.storage\nUntypedStorage\nJ\xff\xff\xff\x7f\x85R.", "storage.UntypedStorage"
    ),
    "storage-called": (b"\x80\x02ctorch\nFloatStorage\nK\x04\x85R.", "damaged .TypeError"),
    "subclass": (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n.", "_rebuild_from_type_v2'"),
    "long-global": (b"\x80\x02cos\n" + b"x" * 9999 + b"\n.", r"refers to 'os\.x{77}'"),
    "global-with-escapes": (b"\x80\x02cos\n\x1b[2J\n.", r"refers to 'os\.\\x1b\[2J'"),
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
        "the tensors up to w claim 4,398,046,511,104 bytes",
    ),
    "stride-0-overflows": (
        one_tensor(shape=b"\x8a\x08" + b"\0" * 7 + b"\x40\x85", strides=b"K\x00\x85"),
        "the tensors up to w claim 18,446,744,073,709,551,616 bytes",
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
    refused(zipped(tmp_path / "a.bin", OPCODES["bytearray"][0]), "refers to '__builtin__.bytea")


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


LAYOUT = "'a.bin' does not have the layout of torch.save"
ARCHIVES: dict[str, tuple[Callable[[Path], object], str]] = {
    "deflate-bomb": (_bomb(zipfile.ZIP_DEFLATED), "unpacks to more than its own size: ask the aut"),
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
        lambda path: saved(path.parent, tiny(), path.name), "is a .safetensors file, rename it"
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


def _sparse(layout: str) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr("warnings.warn", lambda *_, **__: None)
        return getattr(torch.eye(4), f"to_sparse{layout}")()


FLAT = "'a.bin' is not a flat dict of named tensors: save only the adapter's tensors"
PLAIN = "'a.bin': w is not a plain tensor: save only the adapter's tensors"
KIND = "'a.bin': w has dtype torch.{} and shape .*; expected a floating-point tensor .*: save it"
ONE = torch.ones(4)
CONTENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "list": (lambda: [ONE], FLAT),
    "tuple": (lambda: (ONE, ONE), FLAT),
    "tensor-alone": (lambda: ONE, FLAT),
    "none": (lambda: None, FLAT),
    "module": (lambda: nn.Linear(2, 2), f"refers to 'torch.nn.modules.linear.Linear'.*{CALLS}"),
    "number-keys": (lambda: {0: ONE}, FLAT),
    "bytes-keys": (lambda: {b"w": ONE}, f"refers to '_codecs.encode'|{FLAT}"),
    "tuple-keys": (lambda: {("w", 1): ONE}, FLAT),
    "nested": (lambda: {"w": {"lora": ONE}}, PLAIN),
    "nested-ordered": (lambda: {"w": OrderedDict(lora=ONE)}, PLAIN),
    "list-value": (lambda: {"w": [ONE]}, PLAIN),
    "string-value": (lambda: {"w": "unet"}, PLAIN),
    "number-value": (lambda: {"w": 1.0}, PLAIN),
    "none-value": (lambda: {"w": None}, PLAIN),
    "numpy-value": (lambda: {"w": np.ones(4)}, f"refers to 'numpy.*{CALLS}"),
    "dtype-value": (lambda: {"w": torch.float32}, f"refers to 'torch.float32'.*{CALLS}"),
    "empty": (dict, "'a.bin' holds no tensors: check that it is the right file"),
    "int": (lambda: {"w": ONE.long()}, KIND.format("int64")),
    "uint8": (lambda: {"w": ONE.byte()}, KIND.format("uint8")),
    "bool": (lambda: {"w": ONE.bool()}, KIND.format("bool")),
    "complex": (lambda: {"w": ONE.to(torch.complex64)}, KIND.format("complex64")),
    "float8": (lambda: {"w": ONE.to(torch.float8_e4m3fn)}, "float8_e4m3fn|refers to 'torch._"),
    "no-elements": (lambda: {"w": torch.ones(0, 4)}, KIND.format("float32")),
    "quantized": (
        lambda: {"w": torch.quantize_per_tensor(ONE, 0.1, 0, torch.qint8)},
        "refers to 'torch._utils._rebuild_qtensor'",
    ),
    "sparse-coo": (lambda: {"w": _sparse("")}, "refers to 'torch._utils._rebuild_sparse_ten"),
    "sparse-csr": (lambda: {"w": _sparse("_csr")}, "refers to 'torch._utils._rebuild_sparse_ten"),
    "meta": (lambda: {"w": torch.ones(4, device="meta")}, "refers to 'torch._utils._rebuild_meta"),
    "expanded": (
        lambda: {"w": torch.ones(1).expand(1 << 40)},
        "the tensors up to w claim 4,398,046,511,104 bytes.*ask the author",
    ),
    "expanded-scalar": (
        lambda: {"w": torch.ones(()).expand(1 << 30, 1 << 20)},
        "the tensors up to w claim 4,503,599,627,370,496 bytes",
    ),
    "expanded-slowly": (
        lambda: {f"w{n}": torch.ones(1).expand(999) for n in range(999)},
        "the tensors up to w[0-9]+ claim",
    ),
    "too-many": (lambda: dict.fromkeys(map(str, range(8193)), ONE), "holds 8,193 tensors"),
    "unusable-name": (lambda: {"../w": ONE}, "an invalid name, '../w'"),
    "name-of-10-kB": (lambda: {"w" * 10_000: ONE}, "an invalid name, 'w{80}'"),
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
