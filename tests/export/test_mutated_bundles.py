"""Damaged bundles, some 150 of them: each draws a pair or ends in one line that names a file."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

from dualdiff_engine import Engine
from dualdiff_engine.errors import DualDiffError, PairError
from dualdiff_engine.files import sha256_of

SECONDS = 10
FILES = (
    "bundle.json",
    "denoiser.onnx",
    "text_encoder.onnx",
    "vae_decoder.onnx",
    "network.safetensors",
    "text_encoder.safetensors",
    "vae_decoder.safetensors",
    "adapters/adapter.safetensors",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "vae/config.json",
)


def flipped(content: bytes, draw: np.random.Generator, times: int) -> bytes:
    changed = bytearray(content)
    for place in draw.integers(0, len(content), times):
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def damage(content: bytes, draw: np.random.Generator) -> Iterator[tuple[str, bytes | None]]:
    """Names of mutations and what the file is then; None: gone."""
    yield "gone", None
    yield "empty", b""
    yield "half", content[: len(content) // 2]
    yield "longer", content + b"\0" * 64
    yield "zeros", bytes(len(content))
    yield "noise", draw.bytes(min(len(content), 4096))
    yield "bit", flipped(content, draw, 1)
    yield "bits at the front", flipped(content[:256], draw, 3) + content[256:]
    yield "bits", flipped(content, draw, 40)
    yield "other json", b'{"a": [1, null, {"b": 1e999}]}'
    yield "deep json", b"[" * 20_000


@contextmanager
def in_time() -> Iterator[None]:
    """A TimeoutError, which no code of ours catches as its own, for what hangs."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(folder: Path) -> str:
    """ "drawn", or the error's line. Any other exception is a failure of the test."""
    try:
        with in_time(), Engine.from_bundle(folder, device="cpu") as engine:
            (pair,) = engine.generate(seeds=[1], steps=1, output_type="np")
    except PairError:
        return "no good pair"
    except DualDiffError as error:
        return one_line(str(error), folder)
    assert pair.image.shape[-1] == 3
    return "drawn"


def one_line(said: str, folder: Path) -> str:
    """The line itself, which names what lies in the folder."""
    assert "\n" not in said
    assert len(said) < 1500
    assert str(folder) in said
    return said


def vouch(folder: Path, name: str) -> None:
    """Let the manifest say that the file is as it should be, as if it had been written so."""
    manifest = json.loads((folder / "bundle.json").read_text())
    path = folder / name
    if path.is_file():
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    else:
        manifest["files"].pop(name)
    (folder / "bundle.json").write_text(json.dumps(manifest))


@pytest.fixture
def copy(bundle: Any, copy_of: Any) -> Path:
    return copy_of(bundle("dual"))


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(copy: Path, name: str) -> None:
    """As a bad copy leaves them, and as if the bundle had been written so."""
    path, manifest = copy / name, copy / "bundle.json"
    whole, vouched = path.read_bytes(), manifest.read_bytes()
    results, hashed = {}, path.suffix != ".safetensors" and path != manifest
    for kind, content in damage(whole, np.random.default_rng(len(name))):
        # the hashes of weights are not compared when a bundle is opened
        for consistent in (False, True) if hashed else (False,):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            if consistent:
                vouch(copy, name)
            results[kind, consistent] = outcome(copy)
            path.write_bytes(whole)
            manifest.write_bytes(vouched)
    refused = {kind for (kind, _), said in results.items() if said != "drawn"}
    assert refused >= {"gone", "empty", "half", "noise", "deep json"}
    plain = {kind: said for (kind, consistent), said in results.items() if not consistent}
    if hashed:
        # every change is found by its hash, and the file is named
        assert all(name in said for said in plain.values()), plain
    assert outcome(copy) == "drawn"


def test_pipes_are_not_waited_for(copy: Path) -> None:
    for name in ("bundle.json", "denoiser.onnx", "adapters/adapter.safetensors", "vae/config.json"):
        path = copy / name
        whole = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        assert outcome(copy) != "drawn"
        path.unlink()
        path.write_bytes(whole)
    # of no manifest's
    for name in ("other.onnx", "adapters/other.safetensors"):
        os.mkfifo(copy / name)
        assert f"does not list {name}" in outcome(copy)
        (copy / name).unlink()
    assert outcome(copy) == "drawn"


def change(manifest: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for name in path[:-1]:
        manifest = manifest[name]
    manifest[path[-1]] = value


@pytest.mark.parametrize("value", [None, -1, "x", [], {}, 1e999, True])
@pytest.mark.parametrize(
    "path",
    [("first",), ("adapters",), ("adapters", "adapter"), ("base",), ("files",), ("max_batch",),
     ("format",), ("files", "vae/config.json"), ("files", "vae/config.json", "bytes")],
    ids="/".join,
)  # fmt: skip
def test_manifests_with_other_values(copy: Path, path: tuple[str, ...], value: object) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    change(manifest, path, value)
    (copy / "bundle.json").write_text(json.dumps(manifest))
    outcome(copy)


@pytest.mark.parametrize("value", [None, -1, 10**9, "x", ["x"]])
@pytest.mark.parametrize(
    "field",
    [
        "height",
        "max_batch",
        "tokens",
        "scaling_factor",
        "precision",
        "transposed",
        "adapter_weights",
        "base",
        "dynamic_size",
    ],
)
def test_graphs_with_other_metadata(copy: Path, field: str, value: object) -> None:
    """A graph that somebody wrote, with a manifest that vouches for it."""
    import onnx

    for name in ("denoiser.onnx", "text_encoder.onnx"):
        model = onnx.load(copy / name, load_external_data=False)
        entry = next(e for e in model.metadata_props if e.key == f"dualdiff.{field}")
        entry.value = json.dumps(value)
        onnx.save(model, copy / name)
        vouch(copy, name)
    outcome(copy)


Layout = Callable[[Path, Path], Path]


def as_a_link(whole: Path, place: Path) -> Path:
    (place / "bundle").symlink_to(whole)
    return place / "bundle"


def as_a_hub_cache(whole: Path, place: Path) -> Path:
    """snapshots/REVISION/… -> ../../blobs/HASH, one folder for all."""
    snapshot, blobs = place / "snapshots" / "0123", place / "blobs"
    blobs.mkdir()
    for path in [p for p in whole.rglob("*") if p.is_file()]:
        blob = blobs / sha256_of(path)
        shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def as_a_mounted_volume(whole: Path, place: Path) -> Path:
    """NAME -> ..data/NAME, ..data -> ..2026_11_26, as Kubernetes mounts them."""
    shutil.copytree(whole, place / "..2026_11_26")
    (place / "..data").symlink_to("..2026_11_26")
    for path in whole.iterdir():
        (place / path.name).symlink_to(f"..data/{path.name}")
    return place


def as_single_links(whole: Path, place: Path) -> Path:
    """Every file in a folder of its own, as data version control keeps them."""
    for index, path in enumerate(p for p in whole.rglob("*") if p.is_file()):
        store = place / "store" / str(index) / path.name
        store.parent.mkdir(parents=True)
        shutil.copyfile(path, store)
        link = place / "bundle" / path.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(store)
    return place / "bundle"


@pytest.mark.parametrize(
    "layout", [as_a_link, as_a_hub_cache, as_a_mounted_volume], ids=lambda f: f.__name__
)
def test_bundles_of_links(bundle: Any, tmp_path: Path, layout: Layout) -> None:
    from dualdiff_engine.export.folder.verify import verify_bundle

    whole = bundle("dual")
    folder = layout(whole, tmp_path)
    options: dict[str, Any] = {"seeds": [1], "steps": 1, "output_type": "np"}
    (theirs,) = Engine.from_bundle(whole, device="cpu").generate(**options)
    (ours,) = Engine.from_bundle(folder, device="cpu").generate(**options)
    assert np.array_equal(ours.image, theirs.image)
    verify_bundle(folder)


def test_links_into_many_folders_have_a_remedy(bundle: Any, tmp_path: Path) -> None:
    """ONNX Runtime follows none of them."""
    said = outcome(as_single_links(bundle("dual"), tmp_path))
    assert "copy the folder with `cp -rL`" in said


def test_a_name_that_leads_out_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "bundle.json").read_text())
    for name in ("../denoiser.onnx", "/etc/hostname", "adapters/../../x"):
        files = {**manifest["files"], name: manifest["files"]["denoiser.onnx"]}
        (copy / "bundle.json").write_text(json.dumps({**manifest, "files": files}))
        assert f"lists {name!r} outside the bundle folder" in outcome(copy)
