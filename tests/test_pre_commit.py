"""The grep hooks of .pre-commit-config.yaml bite, and the tree passes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIG = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
HOOKS = {hook["id"]: hook for repo in CONFIG["repos"] for hook in repo["hooks"]}
SOURCES = [
    path.relative_to(ROOT)
    for folder in ("dualdiff_engine", "export", "bench")
    for path in (ROOT / folder).rglob("*.py")
]


def test_hooks_need_no_download() -> None:
    assert all(repo["repo"] == "local" for repo in CONFIG["repos"])
    assert {hook["language"] for hook in HOOKS.values()} == {"system", "pygrep"}


@pytest.mark.parametrize(
    ("hook", "file", "caught", "passed"),
    [
        ("no-host-sync", "dualdiff_engine/model/unet.py", "scale = x.item()", "x.items()"),
        ("no-host-sync", "dualdiff_engine/ops/native.py", "torch.cuda.synchronize()", "in_sync()"),
        ("no-print", "dualdiff_engine/engine.py", "    print(x)", "pprint(x)"),
        ("no-print", "export/trt/build.py", "print(x)", "fingerprint(x)"),
    ],
)
def test_grep_hooks_bite(hook: str, file: str, caught: str, passed: str) -> None:
    pattern, files = HOOKS[hook]["entry"], HOOKS[hook]["files"]
    assert re.search(files, file)
    assert re.search(pattern, caught)
    assert not re.search(pattern, passed)


@pytest.mark.parametrize("hook", ["no-host-sync", "no-print"])
def test_the_tree_passes(hook: str) -> None:
    pattern, files = HOOKS[hook]["entry"], HOOKS[hook]["files"]
    checked = [path for path in SOURCES if re.search(files, path.as_posix())]
    assert len(checked) > 20
    found = [
        f"{path}: {line.strip()}"
        for path in checked
        for line in (ROOT / path).read_text("utf-8").splitlines()
        if re.search(pattern, line)
    ]
    assert not found
