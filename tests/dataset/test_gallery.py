"""The gallery: its files, and the page itself in a browser where there is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dualdiff_engine.cli.main import main
from dualdiff_engine.dataset.entries import Entry
from dualdiff_engine.dataset.folder_entries import folder_entries
from dualdiff_engine.dataset.gallery import write_gallery
from dualdiff_engine.errors import DataError, OutputError, SettingsError
from format_cases import names_in, write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><img src=x onerror=alert(1)>"


def content_of(out: Path) -> Any:
    text = (out / "rows.js").read_text("ascii")
    return json.loads(text.splitlines()[0].removeprefix("window.GALLERY = ").removesuffix(";"))


def rows_of(run: Path, count: int) -> Iterator[Entry]:
    """Many pairs of few pictures."""
    own = list(folder_entries(run, "p"))
    for n in range(count):
        base = own[n % len(own)]
        verdict = "accepted" if n % 10 else "area"
        defect = f"defect {n % 3}"
        files = {"image": base.image, "mask": base.mask, "anomaly": base.anomaly}
        yield Entry("bottle", defect, n, **files, scores={"contrast": n / count}, verdict=verdict)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "ä #?%", ["ring", "blob", "parts"])


def test_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page"
    command = ["gallery", str(run), "--product", "bottle", "--out", str(out)]
    assert main(command) == 0
    assert "3 pairs" in capsys.readouterr().out
    assert names_in(out) == {"index.html", "page.js", "rows.js"}
    content = content_of(out)
    assert content["products"] == ["bottle"]
    assert len(content["rows"]) == 3
    # again, over the older one
    assert main(command) == 0
    (out / "mine.txt").write_text("x")
    assert main(command) == 2
    assert "holds mine.txt and is no gallery" in capsys.readouterr().err


def test_refusals(run: Path, tmp_path: Path) -> None:
    entry = next(folder_entries(run, "bottle"))
    with pytest.raises(DataError, match="no pairs"):
        write_gallery([], tmp_path / "x")
    with pytest.raises(SettingsError, match="cannot be a name in rejected"):
        write_gallery([Entry(**{**vars(entry), "defect": "a\nb/c/000001"})], tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "rows.js").symlink_to(tmp_path / "z")
    with pytest.raises(OutputError, match="is no gallery"):
        write_gallery([entry], tmp_path / "y")
    assert not (tmp_path / "x").exists()


def test_no_text_can_leave_its_string(run: Path, tmp_path: Path) -> None:
    entry = next(folder_entries(run, "bottle"))
    bad = Entry(**{**vars(entry), "product": "\u2028", "verdict": HOSTILE, "scores": {HOSTILE: 1}})
    with pytest.raises(SettingsError):
        write_gallery([bad], tmp_path / "x")
    write_gallery([Entry(**{**vars(bad), "product": "é"})], tmp_path / "x")
    assert content_of(tmp_path / "x")["verdicts"] == [HOSTILE]
    page = (tmp_path / "x" / "page.js").read_text("utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
        assert way not in page


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def large(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of 10 000 rows."""
    out = tmp_path_factory.mktemp("large") / "page"
    write_gallery(rows_of(run, 10_000), out)
    return out


@pytest.fixture
def opened(browser: Any, large: Path) -> Iterator[Any]:
    """The large one in a browser that has kept nothing; console errors fail the test."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    faults: list[str] = []
    page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto((large / "index.html").as_uri())
    page.wait_for_selector("#grid .cell")
    yield page
    assert not faults
    page.close()


def nodes(page: Any) -> int:
    return int(page.evaluate("document.querySelectorAll('*').length"))


def names(page: Any) -> list[str]:
    return list(page.locator("#grid .name").all_text_contents())


def chosen(page: Any) -> str:
    return str(page.locator("#grid .cell[aria-selected=true] .name").text_content())


def test_ten_thousand_rows(opened: Any) -> None:
    assert opened.locator("#count").text_content() == "10000 of 10000 pairs"
    opened.wait_for_function("[...document.images].every((i) => i.complete && i.naturalWidth)")
    assert nodes(opened) <= 500
    for share in (0.2, 0.5, 0.99):
        opened.evaluate(f"document.getElementById('grid').scrollTop = 1e7 * {share}")
        opened.wait_for_timeout(50)
        assert nodes(opened) <= 500
    opened.set_viewport_size({"width": 3840, "height": 2160})
    opened.wait_for_timeout(100)
    assert nodes(opened) <= 500


def test_filters(opened: Any) -> None:
    opened.select_option("#verdict", label="area")
    assert opened.locator("#count").text_content() == "1000 of 10000 pairs"
    opened.select_option("#defect", label="defect 1")
    assert opened.locator("#count").text_content() == "333 of 10000 pairs"
    opened.select_option("#verdict", label="all")
    opened.select_option("#score", label="contrast")
    opened.fill("#least", "0.5")
    opened.fill("#most", "0.5006")
    assert opened.locator("#count").text_content() == "2 of 10000 pairs"
    assert [name.split(" ·")[0] for name in names(opened)] == [
        "bottle/defect 1/005002",
        "bottle/defect 1/005005",
    ]
    opened.fill("#least", "2")
    assert opened.locator("#count").text_content() == "0 of 10000 pairs"
    # nothing to act on, and no error
    for key in ("r", "Enter", "End"):
        opened.locator("#grid").press(key)


def test_keys_and_download(opened: Any, tmp_path: Path) -> None:
    grid = opened.locator("#grid")
    # 0 was rejected by a gate: it is not in the list, nor is 2, whose mark is taken back
    for key in ("r", "r", "r", "a", "r"):
        grid.press(key)
    assert chosen(opened).startswith("bottle/defect 2/000005")
    for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "u"):
        grid.press(key)
    assert chosen(opened).startswith("bottle/defect 2/000002")
    with opened.expect_download() as download:
        grid.press("d")
    assert download.value.suggested_filename == "rejected.txt"
    download.value.save_as(tmp_path / "rejected.txt")
    assert (tmp_path / "rejected.txt").read_text() == (
        "bottle/defect 1/000001\nbottle/defect 1/000004\n"
    )
    opened.reload()
    opened.wait_for_selector("#grid .cell.accept")
    opened.select_option("#marked", label="reject")
    assert opened.locator("#count").text_content() == "3 of 10000 pairs"


def test_moving_and_views(opened: Any) -> None:
    grid = opened.locator("#grid")
    grid.press("End")
    assert "/009999" in chosen(opened)
    assert grid.get_attribute("aria-activedescendant") == "pair-9999"
    grid.press("Home")
    grid.press("ArrowDown")
    grid.press("ArrowUp")
    assert "/000000" in chosen(opened)
    tint = opened.locator("#grid .tint").first
    assert tint.is_visible()
    grid.press("o")
    assert not tint.is_visible()
    assert "/image/" in opened.locator("#grid img").first.get_attribute("src")
    grid.press("b")
    assert "/anomaly/" in opened.locator("#grid img").first.get_attribute("src")
    grid.press("Enter")
    assert opened.locator("#large").is_visible()
    opened.keyboard.press("ArrowRight")
    assert "/000001" in opened.locator("#large .name").text_content()
    assert nodes(opened) <= 500
    opened.keyboard.press("Escape")
    assert not opened.locator("#large").is_visible()


def test_hostile_text_is_text(browser: Any, run: Path, tmp_path: Path) -> None:
    entry = next(folder_entries(run, "bottle"))
    bad = Entry(**{**vars(entry), "defect": "<b>x", "verdict": HOSTILE, "scores": {HOSTILE: 1.0}})
    write_gallery([bad], tmp_path / "page")
    page = browser.new_page()
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "page" / "index.html").as_uri())
    page.wait_for_selector("#grid .cell")
    page.wait_for_timeout(100)
    assert HOSTILE in chosen(page)
    assert not alerts
    assert page.locator("#grid b").count() == 0
    page.close()
