"""What goes wrong in a served model: bad requests, other clients, libraries, a lost GPU."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dualdiff_engine import Engine
from dualdiff_engine import engine as engines
from dualdiff_engine.device import is_device_lost
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder.bundle import add_adapter
from dualdiff_engine.pipeline import faults
from serving import served
from small import other_adapter
from support import DATA

FIRST, OTHER = "adapter", "other"
LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"


@pytest.fixture(scope="module")
def repository(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A served bundle of two adapters."""
    root = tmp_path_factory.mktemp("models")
    folder = Path(shutil.copytree(bundle("dual"), root / "pairs" / "1" / "bundle"))
    add_adapter(DATA / "dual" / "model", other_adapter(root / f"{OTHER}.safetensors"), folder)
    return root


@pytest.fixture
def serving(model: ModuleType, repository: Path) -> Iterator[Any]:
    serving = served(model, repository)
    yield serving
    serving.finalize()


def row(value: Any, count: int, dtype: Any) -> np.ndarray:
    return np.array([[value]] * count, dtype)


def request(seeds: list[int], adapter: str | None = None, **more: Any) -> dict[str, np.ndarray]:
    count = len(seeds)
    named = {} if adapter is None else {"ADAPTER": row(adapter.encode(), count, object)}
    inputs = {"SEED": np.array(seeds, np.int64).reshape(-1, 1), "STEPS": row(1, count, np.int32)}
    return {**inputs, **named, **more}


def drawn_by(answer: Any) -> list[tuple[str, int]]:
    """Adapter and seed of every pair."""
    assert answer.error is None, answer.error
    recipes = [json.loads(recipe[0]) for recipe in answer.RECIPE]
    return [(r["adapter"]["source"].removesuffix(".safetensors"), r["seed"]) for r in recipes]


def test_an_omitted_adapter_is_the_bundles_own(serving: Any) -> None:
    """Whatever other clients ask for, before or in the same call."""
    alone = serving.execute([request([1])])[0]
    first = drawn_by(alone)
    (named,) = serving.execute([request([1], OTHER)])
    assert drawn_by(named) == [(OTHER, 1)] != first
    after, other, empty, own = serving.execute(
        [request([1]), request([2], OTHER), request([3], ""), request([4], FIRST)]
    )
    assert drawn_by(after) == first
    assert (after.IMAGE == alone.IMAGE).all()
    assert drawn_by(other) == [(OTHER, 2)]
    assert drawn_by(empty) + drawn_by(own) == [(first[0][0], 3), (first[0][0], 4)]


def test_the_config_may_name_another(model: ModuleType, repository: Path) -> None:
    serving = served(model, repository, parameters={"adapter": OTHER})
    assert drawn_by(serving.execute([request([1])])[0]) == [(OTHER, 1)]
    with pytest.raises(BackendError, match="holds no adapter 'nobody'"):
        served(model, repository, parameters={"adapter": "nobody"})


BLACK = np.zeros((1, 64, 64, 3), np.uint8)
BAD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "negative seed": (request([-1]), "seed must be from 0"),
    "one bad seed of two": (request([1, -5]), "seed must be from 0"),
    "infinite seed": (request([1], SEED=row(np.inf, 1, np.float64)), "seed must be a whole number"),
    "no seed": (request([]), "SEED is missing"),
    "seed left out": ({"STEPS": row(1, 1, np.int32)}, "SEED is missing"),
    "no steps": (request([1], STEPS=np.zeros((0, 1), np.int32)), "STEPS is empty"),
    "empty steps": (request([1], STEPS=np.zeros((1, 0), np.int32)), "STEPS is empty"),
    "zero steps": (request([1], STEPS=row(0, 1, np.int32)), "steps must be"),
    "half a step": (request([1], STEPS=row(1.5, 1, np.float32)), "steps must be"),
    "NaN steps": (request([1], STEPS=row(np.nan, 1, np.float32)), "steps must be"),
    "two kinds of steps": (request([1, 2], STEPS=np.array([[1], [2]], np.int32)), "STEPS differs"),
    "NaN guidance": (request([1], GUIDANCE=row(np.nan, 1, np.float32)), "guidance"),
    "huge guidance": (request([1], GUIDANCE=row(1e30, 1, np.float32)), "guidance"),
    "unknown adapter": (request([1], "nobody"), "no adapter 'nobody' is loaded"),
    "text in no encoding": (request([1], ADAPTER=row(b"\xff", 1, object)), "can't decode"),
    "text of a lost GPU": (request([1], LOST), "no adapter 'CUDA error: an illegal"),
    "surplus background": (request([1], BACKGROUND=BLACK), "trained without background"),
    "flat background": (request([1], BACKGROUND=BLACK[0, :, :, 0]), ""),
}  # fmt: skip


def test_a_bad_request_is_its_own(serving: Any, repository: Path) -> None:
    """A mixed load: every bad request is refused with words, every other one is answered."""
    draw = random.Random(0)
    good = [request([n], draw.choice([None, FIRST, OTHER])) for n in range(6)]
    good += [request([20, 21], OTHER), request([22], STEPS=row(2, 1, np.int32))]
    expected = [serving.execute([one])[0] for one in good]
    load: list[tuple[Any, Any]] = [
        *zip(good, expected, strict=True),
        *((one, match) for one, match in BAD.values()),
    ]
    draw.shuffle(load)
    while load:
        count = draw.randint(2, 6)
        part, load = load[:count], load[count:]
        answers = serving.execute([one for one, _ in part])
        for (_, wanted), answer in zip(part, answers, strict=True):
            if isinstance(wanted, str):
                assert answer.error
                assert wanted in answer.error
                assert not hasattr(answer, "IMAGE")
            else:
                assert drawn_by(answer) == drawn_by(wanted)
                # of another batch: equal up to rounding
                assert abs(answer.IMAGE.astype(int) - wanted.IMAGE).max() <= 1
    assert serving.lost is None


def fail_at(
    monkeypatch: pytest.MonkeyPatch, engine: Engine, seed: int, error: BaseException
) -> list[list[int]]:
    """Drawing this seed raises; returns what was asked for, call by call."""
    asked: list[list[int]] = []
    generate = engine.generate

    def failing(seeds: list[int], **options: Any) -> Any:
        asked.append(seeds)
        if seed in seeds:
            raise error
        return generate(seeds, **options)

    monkeypatch.setattr(engine, "generate", failing)
    return asked


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"),
        BackendError("the graph failed"),
        KeyError("x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_a_library_is_answered_to_one(
    serving: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked = fail_at(monkeypatch, serving.engine, 13, error)
    first, second, third = serving.execute([request([1]), request([12, 13]), request([2])])
    assert asked == [[1, 12, 13, 2], [1], [12, 13], [2]]
    assert [seed for _, seed in drawn_by(first) + drawn_by(third)] == [1, 2]
    assert str(error) in second.error
    assert isinstance(error, BackendError) or type(error).__name__ in second.error


def test_a_pair_that_cannot_be_used_is_an_error_of_its_request(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def second_is_bad(*_: object) -> str | None:
        looked.append(0)
        return "its image is of one colour: try" if len(looked) == 2 else None

    monkeypatch.setattr(faults, "of_pictures", second_is_bad)
    first, second, third = serving.execute([request([5]), request([6]), request([5, 7])])
    assert drawn_by(first)[0][1] == 5
    assert second.error == "the pair of seed 6 cannot be used: its image is of one colour: try"
    assert [seed for _, seed in drawn_by(third)] == [5, 7]
    assert len(looked) == 4


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_lost_gpu_ends_the_instance(
    serving: Any, model: ModuleType, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    """Answers that are there are given; nothing else is tried; then the process ends."""
    error: Exception = RuntimeError(LOST)
    if wrapped:
        error, cause = BackendError("TensorRT failed to run"), error
        error.__cause__ = cause
    ended, codes = threading.Event(), []
    monkeypatch.setattr(os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(model, "LAST_WORDS", 0.05)
    asked = fail_at(monkeypatch, serving.engine, 13, error)
    before, at_fault, like, after = serving.execute(
        [request([1], OTHER), request([13]), request([2]), request([3], STEPS=row(2, 1, np.int32))]
    )
    assert asked == [[1], [13, 2]]
    assert drawn_by(before) == [(OTHER, 1)]
    for answer in (at_fault, like, after, *serving.execute([request([4])])):
        assert "the GPU of this instance failed, so it ends; send the request again" in answer.error
    assert asked == [[1], [13, 2]]
    assert ended.wait(5)
    assert codes == [1]


def test_the_process_of_a_lost_instance_ends() -> None:
    """A real one. What it has to say comes first."""
    code = (
        "import sys, time; sys.path[:0] = sys.argv[1:]; import pytest; "
        "from serving import load_model; module = load_model(pytest.MonkeyPatch()); "
        "module.LAST_WORDS = 0.5; model = module.TritonPythonModel(); "
        f"print(model._end(RuntimeError({LOST!r})), flush=True); time.sleep(60)"
    )
    places = [p for p in sys.path if p and (Path(p) / "serving.py").is_file()]
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code, *places, root],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "the GPU of this instance failed" in done.stdout
    # for the server's log
    assert "an illegal memory access was encountered)" in done.stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(LOST), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("CUDA failure 719: unspecified launch failure ; GPU=0"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_ILLEGAL_ADDRESS"), True),
        (RuntimeError("cudaErrorIllegalAddress"), True),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED"), False),
        # what a caller sent is quoted
        (SettingsError(f"no adapter {LOST!r} is loaded"), False),
    ],
)
def test_what_a_lost_gpu_says(error: Exception, lost: bool) -> None:
    assert is_device_lost(error, torch.device("cpu")) is lost


def test_a_runtime_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("onnxruntime", "onnx_is_not_there:engine", engines.RUNTIMES)
    monkeypatch.setattr(engines, "runtimes", lambda: {"onnxruntime": point})
    with pytest.raises(
        BackendError, match=r"need onnx_is_not_there, which is not installed: pip install"
    ):
        Engine.from_bundle("bundle")
