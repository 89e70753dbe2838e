"""What `dualdiff generate` wrote, read as entries; folders may come from others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualdiff_engine.dataset.folder_entries import folder_entries
from dualdiff_engine.errors import DataError, SettingsError
from dualdiff_engine.folder_writer import MANIFEST
from format_cases import write_run


def change(root: Path, line: int, **fields: object) -> None:
    lines = (root / MANIFEST).read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **fields})
    (root / MANIFEST).write_text("\n".join(lines) + "\n")


def test_a_run_and_a_tree(tmp_path: Path) -> None:
    run = write_run(tmp_path / "bottle" / "broken", ["ring", "blob"])
    alone = list(folder_entries(run, "flask"))
    assert [(e.product, e.defect, e.number) for e in alone] == [
        ("flask", "broken", 0),
        ("flask", "broken", 1),
    ]
    # a score that is not known is left out
    assert alone[1].scores == {"contrast": 1.5}
    assert alone[0].mask == run / "mask" / "00000.png"
    write_run(tmp_path / "screw" / "scratch", ["parts"])
    tree = list(folder_entries(tmp_path))
    assert [(e.product, e.defect) for e in tree] == [("bottle", "broken")] * 2 + [
        ("screw", "scratch")
    ]
    with pytest.raises(SettingsError, match="leave out --product"):
        list(folder_entries(tmp_path, "bottle"))
    with pytest.raises(SettingsError, match="pass --product NAME"):
        list(folder_entries(run))
    with pytest.raises(DataError, match="holds no pairs"):
        list(folder_entries(run / "image"))


def test_verdicts(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["ring", "blob", "blob"])
    change(run, 1, empty_mask=True)
    change(run, 2, accepted=False)
    assert [e.verdict for e in folder_entries(run, "p")] == ["accepted", "empty", "accept"]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"files": {"image": "../../x.png"}}, 2),
        ({"index": 0}, 2),
        ({"index": True}, 2),
        ({"index": -1}, 2),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, fields: dict[str, object], line: int) -> None:
    run = write_run(tmp_path / "run", ["ring", "blob"])
    change(run, 1, **fields)
    with pytest.raises(DataError, match=f"line {line} is damaged"):
        list(folder_entries(run, "p"))


def test_a_cut_last_line_is_no_pair_and_endless_ones_are_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["ring", "blob"])
    path = run / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    assert [e.number for e in folder_entries(run, "p")] == [0]
    path.write_bytes(b"[" * (3 << 20))
    with pytest.raises(DataError, match="line 1 is damaged"):
        list(folder_entries(run, "p"))


def test_links_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", ["ring"])
    (tmp_path / "secret").write_text("x")
    (run / "image" / "00000.png").unlink()
    with pytest.raises(DataError, match="missing or is no regular file"):
        list(folder_entries(run, "p"))
    (run / "image" / "00000.png").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="missing or is no regular file"):
        list(folder_entries(run, "p"))
    (run / "mask").rename(tmp_path / "mask")
    (run / "mask").symlink_to(tmp_path / "mask")
    with pytest.raises(DataError, match="symbolic link"):
        list(folder_entries(run, "p"))
