"""The C++ example: compiled, run on small networks, and compared with Python's ONNX Runtime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from small import LEAST

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "export" / "cpp" / "step.cpp"
HEADERS = (Path(sys.prefix) / "include" / "onnxruntime", Path("/usr/include/onnxruntime"))
KINDS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
VARY = {"batch": 2, "rows": 2}


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """step, linked to the library of the Python package."""
    found = [folder for folder in HEADERS if (folder / "onnxruntime_c_api.h").is_file()]
    if not found or shutil.which("g++") is None:
        pytest.skip(f"needs g++, and: tests/export/headers.sh {HEADERS[0]}")
    folder = tmp_path_factory.mktemp("cpp")
    (library,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(library)
    # what the README says, and warnings
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", str(SOURCE)]
    links = [f"-I{found[0]}", f"-L{folder}", "-lonnxruntime", f"-Wl,-rpath,{folder}"]
    subprocess.run([*command, *links, "-o", str(folder / "step")], check=True)
    return folder / "step"


def step(program: Path, *arguments: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, check=False
    )


def inputs_of(graph: Path, folder: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """Python's session, and random arrays for its inputs, saved in the folder."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    random, arrays = np.random.default_rng(0), {}
    for value in session.get_inputs():
        shape = [VARY.get(size, size) for size in value.shape]
        arrays[value.name] = random.standard_normal(shape).astype(KINDS[value.type])
    arrays["timestep"] = np.array([481], np.float32)
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return session, arrays


def check_step(program: Path, graph: Path, given: Path, tmp_path: Path) -> None:
    session, arrays = inputs_of(graph, tmp_path / "in")
    run = step(program, given, tmp_path / "in", tmp_path / "noise.npy")
    assert run.returncode == 0, run.stderr
    noise, (expected,) = np.load(tmp_path / "noise.npy"), session.run(None, arrays)
    assert noise.dtype == np.float32
    # the same library with the same settings: bit for bit
    np.testing.assert_array_equal(noise, expected)
    assert run.stdout == (f"noise {list(noise.shape)} by ONNX Runtime {onnxruntime.__version__}\n")


@pytest.fixture
def folder(exported_small: Any) -> Path:
    """An export, which a bundle is with more beside it."""
    return exported_small(LEAST)


def test_plain(folder: Path, program: Path, tmp_path: Path) -> None:
    check_step(program, folder / "denoiser.onnx", folder, tmp_path)


def test_shares_in_half_precision(exported_small: Any, program: Path, tmp_path: Path) -> None:
    """With background; the graph itself is given."""
    graph = exported_small(LEAST, background=True, precision="float16") / "denoiser_background.onnx"
    check_step(program, graph, graph, tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("latents", np.zeros((2, 1, 4, 8, 8), np.float32), "has shape [2, 1, 4, 8, 8], but the"),
        ("latents", np.zeros((2, 4, 16, 16), np.float32), "expects [2, batch, 4, 16, 16]"),
        ("context", np.zeros((2, 0, 77, 32), np.float32), "the graph expects [2, rows, 77, 32]"),
        ("timestep", np.zeros(1, np.float16), "has type <f2, but the graph expects another type"),
        ("timestep", np.zeros(1, np.int64), "is of type '<i8': use float32 or float16"),
        ("latents", np.zeros((2, 1, 4, 16, 16), np.float32).T, "is column-major"),
        ("context", None, "cannot read"),
        ("context", b"not an array", "context.npy is not an .npy file of version 1.0"),
        ("context", b"\x93NUMPY\x01\x00\xff\x00{", "ends inside its header"),
        ("context", b"\x93NUMPY\x01\x00\x02\x00{}", "its header has no descr"),
        (
            "context",
            b"\x93NUMPY\x01\x00\x0c\x00{'descr': '<f",
            "the descr in its header is damaged",
        ),
    ],
)
def test_inputs_that_are_refused(
    folder: Path, program: Path, tmp_path: Path, name: str, array: Any, said: str
) -> None:
    inputs_of(folder / "denoiser.onnx", tmp_path)
    path = tmp_path / f"{name}.npy"
    path.unlink()
    if isinstance(array, bytes):
        path.write_bytes(array)
    elif array is not None:
        np.save(path, array)
    run = step(program, folder, tmp_path, tmp_path / "noise.npy")
    assert run.returncode == 1
    assert said in run.stderr
    assert f"{name}.npy" in run.stderr
    assert not (tmp_path / "noise.npy").exists()


def test_a_file_cut_short(folder: Path, program: Path, tmp_path: Path) -> None:
    inputs_of(folder / "denoiser.onnx", tmp_path)
    path = tmp_path / "context.npy"
    path.write_bytes(path.read_bytes()[:-4])
    run = step(program, folder, tmp_path, tmp_path / "noise.npy")
    assert (run.returncode, run.stdout) == (1, "")
    assert "context.npy does not have the length of its shape [2, 2, 77, 32]" in run.stderr


def test_graphs_that_are_refused(folder: Path, program: Path, tmp_path: Path) -> None:
    inputs_of(folder / "denoiser.onnx", tmp_path)
    garbled = tmp_path / "garbled.onnx"
    garbled.write_bytes(b"no graph")
    for graph, said in (
        (tmp_path / "none.onnx", "step: no file"),
        (tmp_path, "has no denoiser graph: create it with `dualdiff export bundle`"),
        (garbled, "step: ONNX Runtime: "),
        (folder / "vae_decoder.onnx", "cannot read"),
    ):
        run = step(program, graph, tmp_path, tmp_path / "noise.npy")
        assert run.returncode == 1
        assert said in run.stderr


def test_where_nothing_can_be_written(folder: Path, program: Path, tmp_path: Path) -> None:
    inputs_of(folder / "denoiser.onnx", tmp_path)
    run = step(program, folder, tmp_path, tmp_path / "none" / "noise.npy")
    assert run.returncode == 1
    assert "cannot write" in run.stderr


def test_usage(program: Path) -> None:
    run = step(program, "bundle")
    assert run.returncode == 2
    assert "usage: step GRAPH INPUTS NOISE.npy" in run.stderr
