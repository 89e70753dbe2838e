"""Engine files: what is checked before one is loaded, whoever built it, wherever it lies."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualdiff_engine import BackendError
from dualdiff_engine.export.folder.bundle import read_manifest, write_manifest
from dualdiff_engine.export.folder.verify import verify_bundle
from dualdiff_engine.export.run import engine as exported_engine
from dualdiff_engine.export.trt import (
    api as tensorrt_api,
)
from dualdiff_engine.export.trt import (
    engine_file,
)
from dualdiff_engine.export.trt import (
    runner as tensorrt_runner,
)
from dualdiff_engine.export.trt.engine_file import Manifest
from dualdiff_engine.files import sha256_of, sha256_of_tensors
from dualdiff_engine.ops import bind

TARGET = "8.9"
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def write_plan(folder: Path, content: bytes = b"plan") -> Path:
    """An engine file of a folder's denoiser; its plan is no plan."""
    manifest = Manifest(
        graph="denoiser",
        flavour="tensorrt-rtx",
        version="1.7",
        targets=[TARGET],
        gpu="",
        graph_sha256=sha256_of(folder / "denoiser.onnx"),
        base={"sha256": "0"},
        adapter={"name": "hole"},
        precision="float16",
        height=8,
        width=8,
        profiles=[[1, 64]],
        refittable=False,
        weights_sha256=sha256_of_tensors({"gate": torch.ones(2)}),
    )
    return engine_file.write(folder, content, manifest, [TARGET])


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For the GPU that this machine is made to have."""
    monkeypatch.setattr(engine_file, "this_gpu", lambda required=True: TARGET)
    (tmp_path / "denoiser.onnx").write_bytes(b"graph")
    return write_plan(tmp_path)


def read(path: Path, **options: Any) -> tuple[Manifest, bytes]:
    return engine_file.read(path, "tensorrt-rtx", "1.7", **options)


def edit(path: Path, **changes: Any) -> None:
    manifest = Path(f"{path}.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))


def test_what_was_written_is_read(plan: Path) -> None:
    manifest, content = read(plan)
    assert content == b"plan"
    assert manifest.profiles == [[1, 64]]
    assert tensorrt_runner.engine_for(plan.parent, "denoiser") == plan
    with pytest.raises(BackendError, match="no TensorRT engine of background_encoder"):
        tensorrt_runner.engine_for(plan.parent, "background_encoder")


def test_an_engine_that_cannot_be_refitted_serves_its_adapter(plan: Path) -> None:
    manifest, _ = read(plan)
    holds, ones = manifest.weights_sha256, torch.ones(2)
    others = [{"gate": 2 * ones}, {"value": ones}, {"gate": ones.half()}, {"gate": ones[None]}, {}]
    wanted = [sha256_of_tensors(weights) for weights in others]
    assert len({holds, *wanted}) == 6
    assert not tensorrt_runner.must_refit(plan, manifest, holds, holds)
    with pytest.raises(BackendError, match=r"serves only the adapter 'hole'.*--refit"):
        tensorrt_runner.must_refit(plan, manifest, holds, wanted[0])
    assert tensorrt_runner.must_refit(plan, replace(manifest, refittable=True), holds, wanted[0])


def test_engines_of_others_need_trust(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(plan.parent / "somebody"))
    with pytest.raises(BackendError, match=r"was not built by you, .*pass trust=True \(--trust\)"):
        read(plan)
    assert read(plan, trust=True)[1] == b"plan"


def test_a_changed_manifest_is_nobodys(plan: Path) -> None:
    edit(plan, profiles=[[1, 1000]])
    with pytest.raises(BackendError, match="was not built by you"):
        read(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "built with format 2, but here it is 1"),
        ({"flavour": "tensorrt"}, "built with flavour tensorrt, but here it is tensorrt-rtx"),
        ({"version": "1.6"}, "built with tensorrt-rtx version 1.6, but here it is 1.7"),
        ({"graph_sha256": "ab"}, "built with hash of denoiser.onnx ab, but here it is"),
        ({"graph": "other"}, "hash of other.onnx .* but here it is no such file"),
        ({"targets": ["9.0"]}, "built for compute capability 9.0, but this GPU has 8.9"),
        ({"gpu": "another card"}, "was built on another card, but this is"),
        ({"plan_sha256": "ab"}, "does not match its manifest"),
        ({"surprise": 1}, "is not a valid manifest"),
    ],
)
def test_engines_of_elsewhere_are_told_apart(
    plan: Path, changes: dict[str, Any], message: str
) -> None:
    edit(plan, **changes)
    with pytest.raises(BackendError, match=message):
        read(plan, trust=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "cannot be read"),
        (b"[]", "is not a valid manifest"),
        (b"{}", "is not a valid manifest"),
        (b" " * (1 << 20) + b"{}", "is not a valid manifest .over 1 MiB"),
    ],
)
def test_damaged_manifests(plan: Path, content: bytes, message: str) -> None:
    Path(f"{plan}.json").write_bytes(content)
    with pytest.raises(BackendError, match=message):
        read(plan, trust=True)


def test_a_truncated_plan(plan: Path) -> None:
    plan.write_bytes(b"pla")
    with pytest.raises(BackendError, match="does not match its manifest"):
        read(plan)
    plan.unlink()
    with pytest.raises(BackendError, match="build it with `dualdiff export tensorrt`"):
        read(plan)


def test_the_key_is_the_users_alone(plan: Path) -> None:
    (key,) = (plan.parent / "data").rglob("builder.key")
    assert key.stat().st_mode & 0o777 == 0o600
    key.write_bytes(b"short")
    with pytest.raises(BackendError, match=r"builder\.key is damaged: delete it"):
        read(plan)


@pytest.mark.parametrize("home", ["a folder that cannot be made", "none"])
def test_without_a_place_for_the_key_a_bundle_runs_by_onnx_runtime(
    plan: Path, rtx: None, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    """A container whose root is read-only, or whose user has no home."""
    if home == "none":
        monkeypatch.delenv("XDG_DATA_HOME")
        monkeypatch.delenv("HOME")
        # a user id without an account
        monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    else:
        # root may write everywhere, except below a file
        monkeypatch.setenv("XDG_DATA_HOME", str(plan))
    backend, why = fastest(plan)
    assert backend == "onnxruntime"
    assert "the key that marks engines as built by you cannot be kept" in why
    assert "set XDG_DATA_HOME to a folder that can be written" in why
    assert fastest(plan, trust=True)[0] == "tensorrt"


def test_an_adapter_that_an_engine_cannot_take_leaves_the_one_before(plan: Path) -> None:
    """Its requests fail; those for the adapter before must not be drawn with it."""
    runner = object.__new__(tensorrt_runner.TensorrtRunner)
    runner.path, (runner.manifest, _) = plan, read(plan)
    runner._holds = runner.manifest.weights_sha256
    artefact: Any = SimpleNamespace(
        graph="denoiser", precision="float32", transposed=[], adapter_weights=["gate"]
    )
    denoiser = tensorrt_runner.TensorrtDenoiser(
        bind("reference"), {"denoiser": artefact}, plan.parent, CUDA, flavour="tensorrt-rtx"
    )
    own = {"gate": torch.ones(2)}
    denoiser.load(own)
    denoiser._runners["denoiser"] = runner
    denoiser.load(own)
    assert denoiser._runners == {"denoiser": runner}
    with pytest.raises(BackendError, match="serves only the adapter 'hole'"):
        denoiser.load({"gate": 2 * torch.ones(2)})
    assert denoiser._changed is own
    assert not denoiser._runners


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the TensorRT-RTX that built the plan were installed."""
    installed = SimpleNamespace(__version__="1.7")
    monkeypatch.setattr(tensorrt_api, "installed", lambda: "tensorrt-rtx")
    monkeypatch.setattr(tensorrt_api, "package", lambda flavour: installed)


def fastest(plan: Path, trust: bool = False) -> tuple[str, str]:
    artefacts: dict[str, Any] = {"denoiser": None}
    return exported_engine.fastest(plan.parent, artefacts, CUDA, trust)


def test_a_bundle_takes_engines_that_may_run_here(plan: Path, rtx: None) -> None:
    assert fastest(plan)[0] == "tensorrt"
    edit(plan, version="1.6")
    backend, why = fastest(plan, trust=True)
    assert backend == "onnxruntime"
    assert "not TensorRT: " in why
    assert "built with tensorrt-rtx version 1.6, but here it is 1.7" in why
    plan.unlink()
    assert "holds no TensorRT engine of denoiser" in fastest(plan)[1]
    assert exported_engine.fastest(plan.parent, {}, torch.device("cpu"), False) == (
        "onnxruntime",
        "",
    )


def test_a_bundle_takes_engines_of_others_when_told_to(
    plan: Path, rtx: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(plan.parent / "somebody"))
    backend, why = fastest(plan)
    assert backend == "onnxruntime"
    assert "was not built by you" in why
    assert fastest(plan, trust=True)[0] == "tensorrt"


def test_engines_beside_a_bundle(bundle: Any, copy_of: Any) -> None:
    """They come after it and may be built again; what verifies it verifies them."""
    folder = copy_of(bundle("dual"))
    path = write_plan(folder)
    (folder / engine_file.TIMING_CACHE).write_bytes(b"times")
    assert verify_bundle(folder)["engines"] == 1
    files = read_manifest(folder)["files"]
    assert write_manifest(folder)["files"] == files
    write_plan(folder, b"another plan")
    assert verify_bundle(folder)["engines"] == 1
    path.write_bytes(b"another plan, damaged")
    with pytest.raises(BackendError, match=r"sm_89\.plan does not match its manifest"):
        verify_bundle(folder)
    Path(f"{path}.json").unlink()
    with pytest.raises(BackendError, match=r"no .*sm_89\.plan\.json"):
        verify_bundle(folder)
