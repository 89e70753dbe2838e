"""Exports of the golden models: made once per session, and kept until the code changes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock

from small import small_engine
from support import DATA, golden_engine

pytest.importorskip("onnxscript")

ROOT = Path(__file__).parent.parent.parent


MAKERS = (
    "dualdiff_engine/adapters/*.py",
    "dualdiff_engine/base_model/*.py",
    "dualdiff_engine/model/*.py",
    "dualdiff_engine/ops/*.py",
    "dualdiff_engine/pipeline/text.py",
    "export/folder/*.py",
    "export/graph/*.py",
)


def code() -> str:
    """A hash of what an export depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MAKERS for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    # random weights are others with other vector instructions
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    return digest.hexdigest()[:16]


class Kept:
    """Exports by what was asked for, shared by the processes that run tests side by side."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, asked: list[Any], make: Callable[[Path], object]) -> Path:
        """The folder that `make` wrote for it, now or before. Tests only read it."""
        folder = self.root / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
        with FileLock(folder.with_suffix(".lock")):
            if not folder.exists():
                make(folder)
        return folder


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> Kept:
    return Kept(Path(request.config.cache.mkdir(f"exports-{code()}")))


@pytest.fixture(scope="session")
def exported(kept: Kept) -> Any:
    """exported(case, **options): the folder that `export_onnx` wrote."""

    def get(name: str, **options: Any) -> Path:
        from dualdiff_engine.export.graph.write import ExportOptions, export_onnx

        def make(folder: Path) -> None:
            export_onnx(golden_engine(name), folder, ExportOptions(**options))

        return kept.get([name, sorted(options.items())], make)

    return get


@pytest.fixture(scope="session")
def exported_small(kept: Kept, tmp_path_factory: Any) -> Any:
    """exported_small(channels, background=, **options): as `exported`, of a small network."""

    def get(channels: tuple[int, ...], *, background: bool = False, **options: Any) -> Path:
        from dualdiff_engine.export.graph.write import ExportOptions, export_onnx

        def make(folder: Path) -> None:
            base = tmp_path_factory.mktemp("base") / "base"
            engine = small_engine(base, channels, background=background)
            export_onnx(engine, folder, ExportOptions(**options))

        return kept.get([channels, background, sorted(options.items())], make)

    return get


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """copy_of(folder): the same export, to be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture(scope="session")
def bundle(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """bundle(case): written from an export that is there, so that nothing is traced twice."""

    def get(name: str) -> Path:
        from dualdiff_engine.export.folder.bundle import write_bundle
        from dualdiff_engine.export.graph import write

        out = tmp_path_factory.getbasetemp() / f"bundle-{name}"
        if not out.exists():
            # before the patch below: an export is written by what is patched
            made = exported(name)

            def reuse(engine: Any, folder: Path, *_: Any) -> None:
                shutil.copytree(made, folder, dirs_exist_ok=True)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(write, "write_folder", reuse)
                write_bundle(
                    DATA / name / "model", [DATA / name / "adapter"], out, allow_pickle=True
                )
        return out

    return get


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """model.py, with the server's module in its place."""
    from serving import load_model

    return load_model(monkeypatch)
