"""TensorRT's own Python without TensorRT: its bindings over libraries whose functions do nothing.

The bindings are a package of their own (`tensorrt-cu13-bindings`, a megabyte); the libraries cannot
be had from a package registry. Enumerations, classes and signatures are real then, and so is all of
`tensorrt.plugin`; a Builder cannot be made.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# what the bindings link to, by library
FUNCTIONS = {
    "nvinfer": [
        "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL", "getPluginRegistry", "getBuilderPluginRegistry",
        "getLogger", "getInferLibVersion",
    ],
    "nvinfer_plugin": ["initLibNvInferPlugins"],
    "nvonnxparser": [
        "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ],
}  # fmt: skip
MAJOR = 11


def load_libraries(folder: Path) -> None:
    """Under the names that the bindings look for, for as long as this process runs."""
    for library, functions in FUNCTIONS.items():
        source, name = folder / f"{library}.c", f"lib{library}.so.{MAJOR}"
        source.write_text("\n".join(f"void *{f}(void) {{ return 0; }}" for f in functions))
        command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, source.name]
        subprocess.run(command, cwd=folder, check=True)
        ctypes.CDLL(str(folder / name))


class Registry:
    """Of plugins; the real one is the library's."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, *named: str) -> Any:
        return self.creators[named]


@pytest.fixture
def bindings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """TensorRT as `import tensorrt` would give it."""
    if importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("needs tensorrt-cu13-bindings")
    if "tensorrt_bindings" not in sys.modules:
        load_libraries(tmp_path)
    trt: Any = importlib.import_module("tensorrt_bindings")
    registry = Registry()
    monkeypatch.setattr(trt, "get_plugin_registry", lambda: registry, raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    yield trt
    for name in [name for name in sys.modules if name.startswith("tensorrt.")]:
        del sys.modules[name]
