"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dualdiff_engine.errors import OutputError
from dualdiff_engine.files import partial_name, write_whole, written_whole


def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path: Path) -> None:
    """safetensors writes into a file of its own first, which a kill leaves under a random name."""
    path = tmp_path / "a.safetensors"
    pid = os.fork()
    if pid == 0:
        with written_whole(path) as partial:
            save_file({"a": torch.ones(3)}, partial)
            partial.with_name(".tmpAbCdEf").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert not path.exists()
    write_whole(path, b"whole")
    assert [other.name for other in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"whole"


def test_a_link_at_the_temporary_place_is_not_followed(tmp_path: Path) -> None:
    path, outside = tmp_path / "out" / "a.json", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_bytes(b"precious")
    path.parent.mkdir()
    partial_name(path).symlink_to(outside)
    write_whole(path, b"new")
    assert (outside / "precious").read_bytes() == b"precious"
    assert path.read_bytes() == b"new"


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OutputError, match=r"a\.json cannot be written"):
        write_whole(tmp_path / "a.json", b"new")
    assert [other.name for other in tmp_path.iterdir()] == ["a.json"]
