"""An adapter for a full SD-1.5 with random weights, trained on a CPU: `pytest -m slow -s`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dualdiff_engine import Engine
from dualdiff_engine.bench.step.random_base import write_base
from training_cases import DEFECT, inputs_of, mask_of, picture_of, save

LIMIT_GIB = 24


def write_pictures(root: Path) -> Path:
    random = np.random.default_rng(0)
    for index in range(2):
        save(picture_of(root, index), random.integers(0, 256, (512, 512, 3), dtype=np.uint8))
        mask = np.zeros((512, 512), np.uint8)
        mask[100:200, 100 : 180 + 20 * index] = 255
        save(mask_of(root, index), mask)
    return root


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_full_size_adapter_trains_within_24_gib(tmp_path: Path) -> None:
    base, data, out = (
        write_base(tmp_path / "base", "sd15", 0, full=True, dtype=torch.float16),
        write_pictures(tmp_path / "data"),
        tmp_path / "o",
    )
    code = "import sys; from dualdiff_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [
        *("train", "--base", base, "--data", data, "--defect", DEFECT, "--out", out),
        *("--steps", "3", "--batch", "1", "--accumulate", "2", "--gradient-checkpointing"),
        *("--flips", "none", "--sample-every", "0", "--device", "cpu", "--dtype", "float32"),
    ]
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, env=os.environ)
    seconds = time.monotonic() - start
    # kilobytes, on Linux
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak, worked = used.ru_maxrss / 2**20, used.ru_utime + used.ru_stime
    print(
        f"\n3 steps of 2 pictures at 512²: {seconds:.0f} s, {worked:.0f} s of CPU time, "
        f"peak {peak:.1f} GiB"
    )
    assert peak < LIMIT_GIB
    with Engine.from_pretrained(base, adapter=out) as engine:
        assert len(engine.adapters) == 1
        latents, times, _, _ = inputs_of(False, batch=1)
        assert latents is not None
        assert times is not None
        noise = engine.predict_noise(latents[:, None], float(times[0]), engine.encode_prompts())
        assert noise.isfinite().all()
