"""The pages in docs/: their snippets run, and what they name exists."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine import errors

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


def options_of(command: Any) -> set[str]:
    """Every option that a command or one of its subcommands takes."""
    own = {
        name for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    }
    return own.union(*(options_of(sub) for sub in getattr(command, "commands", {}).values()))


def test_every_option_that_a_page_names_exists() -> None:
    import typer

    from dualdiff_engine.bench import cli as bench
    from dualdiff_engine.cli.main import app

    known = options_of(typer.main.get_command(app)) | set(bench.parser()._option_string_actions)
    # of the GPU suite, of the full-size export, and of the budget
    known |= {"--interpret", "--tensorrt-rtx", "--update"}
    pages = [*PAGES, *READMES, ROOT / "dualdiff_engine" / "training" / "README.md"]
    # of NVIDIA's server
    named = {"--model-repository": "export/README.md"}
    for page in pages:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text("utf-8")):
            if named.get(option) != str(page.relative_to(ROOT)):
                assert option in known, f"{page.name}: {option}"


def test_the_table_of_errors_is_complete() -> None:
    page = (ROOT / "docs" / "faults.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", page, re.MULTILINE))
    own = {error.__name__: error for error in errors.DualDiffError.__subclasses__()}
    assert rows.keys() == own.keys()
    for name, other in rows.items():
        assert issubclass(own[name], getattr(builtins, other)), name
