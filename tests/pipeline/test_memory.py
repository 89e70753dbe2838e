"""Memory that runs out anywhere in a run: what fits is drawn, what cannot is one clear error."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from dualdiff_engine import Engine, OutOfMemoryError
from dualdiff_engine.device import is_out_of_memory, onednn_refuses
from dualdiff_engine.errors import BackendError, BaseModelError
from support import DATA, golden_engine

QUICK: dict[str, Any] = {"steps": 2, "size": 64}
# what libraries raise, in their own words
ERRORS = {
    "python": MemoryError(),
    "torch cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "torch cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "mapping": RuntimeError(
        "unable to mmap 3438167534 bytes from file <unet.safetensors>: Cannot allocate memory (12)"
    ),
    "system": OSError(12, "Cannot allocate memory"),
    "c++": RuntimeError("std::bad_alloc"),
    "onednn": RuntimeError("could not create a primitive"),
    "onednn memory": RuntimeError("could not create a memory object"),
    "onnx runtime": RuntimeError(
        "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
        "Conv node. Failed to allocate memory for requested buffer of size 17179869184"
    ),
    "cudnn": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}
anywhere = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())


def pixels(pairs: Any) -> list[np.ndarray]:
    return [np.stack([np.asarray(pair.image), np.asarray(pair.anomaly)]) for pair in pairs]


class Failing:
    """A callable that raises, the first times that it is called or above a batch."""

    def __init__(self, real: Any, error: Exception, times: float = 1) -> None:
        self.real, self.error, self.times, self.calls = real, error, times, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return self.real(*arguments, **options)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a convolution"),
        ValueError("height and width must be multiples of 8"),
        RuntimeError("Expected all tensors to be on the same device"),
        OSError(2, "No such file or directory"),
    ],
)
def test_other_errors_are_not_about_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)
    # what was raised from an error about memory is
    chained = BaseModelError("vae cannot be loaded: download it again")
    chained.__cause__ = error
    assert not is_out_of_memory(chained)
    error.__cause__ = MemoryError()
    assert is_out_of_memory(chained)


@anywhere
def test_a_batch_is_halved_whatever_says_so(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pairs are those of the smaller batch, byte for byte."""
    engine = golden_engine("dual")
    expected = pixels(engine.generate(seeds=range(4), batch=2, **QUICK))
    real = type(engine.unet).forward

    def forward(self: Any, latents: Any, *rest: Any) -> Any:
        if latents.shape[2] > 2:
            raise error
        return real(self, latents, *rest)

    monkeypatch.setattr(type(engine.unet), "forward", forward)
    found = pixels(engine.generate(seeds=range(4), batch=4, **QUICK))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@anywhere
def test_decoding_is_tried_again_with_more_room(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = golden_engine("dual")
    expected = pixels(engine.generate(seeds=range(3), **QUICK))
    decode = Failing(engine.vae.decode, error)
    monkeypatch.setattr(engine.vae, "decode", decode)
    found = pixels(engine.generate(seeds=range(3), **QUICK))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    # two pictures per pair, one of them twice; the warning comes once
    assert decode.calls == 7
    assert [record.args for record in caplog.records] == [("while a pair is decoded",)]


def test_decoding_that_never_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = golden_engine("dual")
    monkeypatch.setattr(engine.vae, "decode", Failing(None, ERRORS["torch cpu"], float("inf")))
    with pytest.raises(OutOfMemoryError, match="while a pair is decoded: use a smaller size"):
        engine.generate(seeds=[1], **QUICK)


def test_a_background_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualdiff_engine import Background

    engine = golden_engine("bcm")
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    options: dict[str, Any] = {"background": Background(picture, noise="fixed"), **QUICK}
    expected = pixels(engine.generate(seeds=[1], **options))
    other = Background(picture[::-1].copy(), noise="fixed")
    engine.generate(seeds=[1], **{**options, "background": other})
    encode = Failing(engine.vae.encode, ERRORS["c++"])
    monkeypatch.setattr(engine.vae, "encode", encode)
    found = pixels(engine.generate(seeds=[1], **options))
    assert np.array_equal(found[0], expected[0])
    encode.times = float("inf")
    with pytest.raises(OutOfMemoryError, match="while the background is encoded"):
        engine.generate(seeds=[1], **{**options, "background": other})


def test_prompts_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = golden_engine("dual")
    monkeypatch.setattr(
        engine.text_encoder, "encode", Failing(None, ERRORS["python"], float("inf"))
    )
    with pytest.raises(OutOfMemoryError, match="while the prompts are encoded"):
        engine.generate(seeds=[1], **QUICK)


@anywhere
@pytest.mark.parametrize(
    "place",
    [
        "dualdiff_engine.base_model.tensors.safe_open",
        "dualdiff_engine.base_model.model.BaseModel.load_vae",
        "dualdiff_engine.adapters.fold.fold_sites",
    ],
)
def test_loading_that_does_not_fit(
    error: Exception, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never "damaged" or "download it again"."""
    monkeypatch.setattr(place, Failing(None, error, float("inf")))
    model, adapter = DATA / "dual" / "model", DATA / "dual" / "adapter"
    with pytest.raises(OutOfMemoryError, match=r"while the model is loaded: close other programs"):
        Engine.from_pretrained(model, adapter=adapter, allow_pickle=True)


def test_onednn_that_creates_nothing_is_not_short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = str(ERRORS["onednn"])
    # it works here, so a large kernel that failed did so for memory
    assert not onednn_refuses(words)
    assert not onednn_refuses("std::bad_alloc")
    engine = golden_engine("dual")
    broken = Failing(None, ERRORS["onednn"], float("inf"))
    monkeypatch.setattr(torch.ops.aten, "mkldnn_convolution", broken)
    assert onednn_refuses(words)
    monkeypatch.setattr(engine.denoiser, "forward", broken)
    with pytest.raises(BackendError, match="oneDNN cannot create any kernel on this machine"):
        engine.generate(seeds=[1], **QUICK)


LIMITED = """
import resource, sys
from pathlib import Path
from dualdiff_engine import Engine, OutOfMemoryError
model = sys.argv[1]
Engine.from_pretrained(model, device="cpu").close()
pages = int(Path("/proc/self/statm").read_text().split()[0])
# all that is there, and a little that no second model fits into
limit = pages * resource.getpagesize() + (1 << 20)
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
try:
    engines = [Engine.from_pretrained(model, device="cpu") for _ in range(100)]
except OutOfMemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_loading_under_a_real_limit() -> None:
    command = [sys.executable, "-c", LIMITED, str(DATA / "dual" / "model")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout.startswith("out of memory while the model is loaded: "), run.stderr[-2000:]
