"""The pages in docs/: their snippets run, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
READMES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "export/README.md")]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# what a page names in backticks and means as a file or folder of the repository
NAMED = re.compile(
    r"`((?:dualdiff_engine|bench|csrc|docs|examples|export|tests)/[\w./-]*|\w+\.md)`"
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)[^)]*\)")


def snippets(page: Path) -> list[str]:
    return SNIPPET.findall(page.read_text("utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda p: p.name)
def test_snippets_run(page: Path) -> None:
    names: dict[str, Any] = {}
    for number, source in enumerate(snippets(page), 1):
        # written by us, a few lines above
        exec(compile(source, f"{page.name}, snippet {number}", "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_exist(page: Path) -> None:
    named = set(NAMED.findall(page.read_text("utf-8")))
    assert named, f"{page.name} names no file"
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


@pytest.mark.parametrize("page", PAGES + READMES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text("utf-8"))
    missing = sorted(target for target in targets if not (page.parent / target).exists())
    assert not missing


def test_every_snippet_that_proves_a_fold_is_there() -> None:
    source = "\n".join(snippets(ROOT / "docs" / "model.md"))
    folds = ("fold_self_site", "gate_weight", "background_keep", "time_inputs", "predict_noise")
    assert all(name in source for name in folds)
    assert source.count("assert_close") >= len(folds)


def test_a_newcomer_finds_the_answers() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+\?) \| `([^`]+)` \| `([^`]+)` \|$", page, re.MULTILINE)
    assert len(rows) >= 20
    for question, file, word in rows:
        assert word in (ROOT / file).read_text("utf-8"), question
