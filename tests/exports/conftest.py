"""Exports of the golden models: made once per session, and kept until the code changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from support import golden_engine

pytest.importorskip("onnxscript")

ROOT = Path(__file__).parent.parent.parent


MAKERS = (
    "dualdiff_engine/[atw]*.py",
    "dualdiff_engine/model/*.py",
    "dualdiff_engine/ops/*.py",
    "export/[aefgow]*.py",
    "export/trace.py",
    "export/validate.py",
)


def code() -> str:
    """A hash of what an export depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in MAKERS for path in ROOT.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@pytest.fixture(scope="session")
def exported(request: pytest.FixtureRequest) -> Any:
    """exported(case, **options): the folder that `export_onnx` wrote. Tests only read it."""
    kept = Path(request.config.cache.mkdir(f"exports-{code()}"))

    def get(name: str, **options: Any) -> Path:
        from dualdiff_engine.export.onnx_export import Options, export_onnx

        said = json.dumps([name, sorted(options.items())])
        folder = kept / hashlib.sha256(said.encode()).hexdigest()[:16]
        if not folder.exists():
            export_onnx(golden_engine(name), folder, Options(**options))
        return folder

    return get


@pytest.fixture
def copy_of(tmp_path: Path) -> Any:
    """copy_of(folder): the same export, to be damaged."""
    import shutil

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy
