"""Who may import whom, and that optional means optional."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dualdiff_engine"
OPTIONAL = (
    *("triton", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "xformers"),
    *("matplotlib", "torch_fidelity", "lpips", "supervision", "pycocotools", "webdataset"),
    *("pydantic", "fastapi", "uvicorn"),
)

# What the modules of a room (or a single module) may import of ours. Every module is in one of
# these; the longest name that fits counts. `docs/architecture.md` draws the picture.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "settings": {"errors"},
    "files": {"errors"},
    "device": {"errors"},
    "pictures": {"errors"},
    "pair": {"errors", "settings"},
    "folder_writer": {"errors", "files", "pair", "pictures"},
    "adapters": {"errors", "exchanges", "files", "model", "settings"},
    "ops": {"errors", "files", "device"},
    "exchanges": {"ops"},
    "model": {"errors", "exchanges", "ops"},
    "base_model": {"errors", "files", "model"},
    "pipeline": {
        *("adapters", "device", "errors", "files", "model", "ops", "pair", "pictures", "settings"),
    },
    "engine": {
        *("adapters", "base_model", "device", "errors", "files", "model", "ops", "pair"),
        *("pipeline", "settings"),
    },
    "training": {
        *("adapters", "base_model", "device", "engine", "errors", "exchanges", "files"),
        *("folder_writer", "model", "ops", "pair", "pictures", "pipeline", "settings"),
    },
    "demo": {
        *("adapters", "engine", "errors", "files", "pair", "settings", "training"),
    },
    "evaluation": {
        *("adapters", "demo", "engine", "errors", "files", "folder_writer", "pair", "pictures"),
        *("settings", "training"),
    },
    "dataset": {
        *("adapters", "base_model", "demo", "device", "engine", "errors", "files", "folder_writer"),
        *("pair", "pictures", "pipeline", "settings", "training"),
    },
    "cli": {
        "dataset",
        *("adapters", "base_model", "demo", "device", "engine", "errors", "evaluation", "files"),
        *("folder_writer", "model", "ops", "pair", "pictures", "pipeline", "settings", "training"),
    },
}
PACKAGE_ROOMS = set(LAYERS)
LAYERS["export"] = PACKAGE_ROOMS - {"cli", "training", "evaluation", "demo", "dataset"}
LAYERS["bench"] = PACKAGE_ROOMS | {"export"}
# the command line registers the verbs of the exports
ARROWS_UP = {("cli.main", "export.cli")}
# not imported: started as a process of its own
STARTED = {("bench.gpu.step_parts", "bench.gpu.first_step")}


def module_paths() -> dict[str, Path]:
    """Every module of ours by its name below `dualdiff_engine`, its own `__init__` apart."""
    paths = {}
    for root in (PACKAGE, ROOT / "bench", ROOT / "export"):
        base = PACKAGE if root == PACKAGE else ROOT
        for path in root.rglob("*.py"):
            name = ".".join(path.relative_to(base).with_suffix("").parts)
            paths[name.removesuffix(".__init__")] = path
    del paths["__init__"]
    return paths


MODULES = module_paths()


def own_name(text: str) -> str | None:
    """The module of ours that a dotted name leads to."""
    if not re.fullmatch(r"dualdiff_engine(\.\w+)+", text):
        return None
    name = text.removeprefix("dualdiff_engine.")
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def own_imports(path: Path) -> set[str]:
    """Modules of ours that a file names: in any import statement, wherever it is, or as text."""
    names = set()
    tree = ast.parse(path.read_text())
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {own_name(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {own_name(name) for name in whole}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # "dualdiff_engine.engine" as a string may be imported; docstrings are not
            names |= {own_name(node.value)} if id(node) not in texts else set()
    return {name for name in names if name}


def room_of(module: str) -> str:
    """The longest entry of LAYERS that a module belongs to."""
    parts = module.split(".")
    fits = [".".join(parts[: n + 1]) for n in range(len(parts))]
    found = [name for name in fits if name in LAYERS]
    assert found, f"{module} is in no room: add it to LAYERS"
    return found[-1]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name: str) -> None:
    room = room_of(name)
    for other in sorted(own_imports(MODULES[name])):
        target = room_of(other)
        fine = target == room or target in LAYERS[room] or (name, other) in ARROWS_UP
        assert fine, f"{name} imports {other}: {room} may import {sorted(LAYERS[room])}"


def test_rooms_form_no_circle() -> None:
    order = graphlib.TopologicalSorter({**LAYERS, "": PACKAGE_ROOMS})
    assert set(order.static_order()) == {*LAYERS, ""}


def test_modules_form_no_circle() -> None:
    arrows = {name: own_imports(path) - {name} for name, path in MODULES.items()}
    for package in [name for name, path in MODULES.items() if path.name == "__init__.py"]:
        # what a package hands on from its own files is no arrow of theirs
        arrows[package] = {
            other for other in arrows[package] if not other.startswith(f"{package}.")
        }
    for name, other in ARROWS_UP | STARTED:
        arrows[name].discard(other)
    tuple(graphlib.TopologicalSorter(arrows).static_order())


def test_a_circle_and_an_arrow_up_are_found(tmp_path: Path) -> None:
    kinds = (
        "import dualdiff_engine.engine",
        "from dualdiff_engine import engine as e",
        "from dualdiff_engine.engine import Engine",
        "def f():\n    from dualdiff_engine import engine",
        "if TYPE_CHECKING:\n    from dualdiff_engine.engine import Engine",
        'import importlib\nimportlib.import_module("dualdiff_engine.engine")',
    )
    for text in kinds:
        path = tmp_path / "masks.py"
        path.write_text(text)
        assert own_imports(path) == {"engine"}, text


def test_the_top_level_is_as_planned() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {
        *("__init__", "engine", "settings", "errors", "pair", "device", "files"),
        *("pictures", "folder_writer"),
    }


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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_and_functions_stay_small(name: str) -> None:
    path = MODULES[name]
    source = path.read_text()
    if (lines := source.count("\n")) > 400:
        # one thing is not split over two files to get below a number
        warnings.warn(f"{name} has {lines} lines", stacklevel=1)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1
                most = 120 if node.name.endswith("_kernel") else 50
                assert lines <= most, f"{name}: {node.name} has {lines} lines"


def test_every_package_is_installed() -> None:
    """A checkout imports what an installed package lacks, if it is not listed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    setup = project["tool"]["setuptools"]
    listed = set(setup["packages"])
    found = set()
    for name, folder in setup["package-dir"].items() | {("dualdiff_engine", "dualdiff_engine")}:
        for file in (ROOT / folder).rglob("*.py"):
            found.add(".".join([name, *file.parent.relative_to(ROOT / folder).parts]))
    assert listed == found
