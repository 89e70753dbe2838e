"""Who may import whom, and that optional means optional."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dualdiff_engine"
OPTIONAL = (
    *("triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "xformers"),
    *("matplotlib", "torch_fidelity", "lpips"),
)

# what a module may import of ours; a longer prefix is more specific
LAYERS = {
    "errors": set(),
    "settings": {"errors"},
    "memory": set(),
    "pair": {"errors"},
    "pictures": set(),
    "folder_writer": {"errors", "pair"},
    "adapters": {"adapters", "errors", "settings"},
    "request": {"errors", "ops", "settings"},
    "ops": {"ops", "errors"},
    "model": {"model", "ops", "errors"},
    "base_model": {"model", "errors"},
    "pipeline": {
        *("adapters", "errors", "memory", "model", "ops", "pair", "pipeline", "settings"),
    },
    "markdown": set(),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.append((name.removesuffix(".__init__"), path))
    return found


def own_imports(path: Path) -> set[str]:
    """Top names of ours that a file imports, TYPE_CHECKING blocks aside."""
    tree = ast.parse(path.read_text())
    checked_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node in checked_only:
            continue
        if node.module == "dualdiff_engine":
            names |= {alias.name for alias in node.names}
        elif node.module and node.module.startswith("dualdiff_engine."):
            names.add(node.module.split(".")[1])
    return names


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: str(value))
def test_imports_point_downwards(name: str, path: Path) -> None:
    allowed = LAYERS.get(name.split(".")[0])
    imported = own_imports(path)
    # the command registers export's commands, which import nothing slow
    assert not imported & ({"bench"} if name.startswith("cli") else {"bench", "cli", "export"})
    if allowed is not None:
        assert imported <= allowed


def python(code: str) -> str:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_quick_and_touches_nothing() -> None:
    loaded = python(
        "import sys, socket\n"
        "def refuse(*_): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import dualdiff_engine\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'cv2') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_runs_without_optional_packages() -> None:
    out = python(
        "import sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        "import dualdiff_engine as dd\n"
        f"engine = dd.Engine.from_pretrained({str(ROOT / 'tests/data/dual/model')!r},\n"
        f"    adapter={str(ROOT / 'tests/data/dual/adapter')!r}, allow_pickle=True)\n"
        "print(len(engine.generate(seeds=[1], steps=1, size=64)))"
    )
    assert out.strip() == "1"


BESIDE = [path for folder in ("bench", "export") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [p for _, p in modules()] + BESIDE)
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text()
    if (lines := source.count("\n")) > 400:
        # one thing is not split over two files to get below a number
        warnings.warn(f"{path.name} has {lines} lines", stacklevel=1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                most = 120 if node.name.endswith("_kernel") else 50
                assert lines <= most, f"{path.name}: {node.name} has {lines} lines"
