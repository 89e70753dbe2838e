"""How long a process takes to its first denoiser step: `first_step [--interpret]`.

Compiled kernels come from Triton's cache on disk. Prints a line of JSON, in seconds: imports, a
network with random weights in place of files, the first step, the second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

START = time.perf_counter()


def main() -> None:
    interpreted = "--interpret" in sys.argv[1:]
    if interpreted:
        import dualdiff_engine.bench.gpu.interpreter  # noqa: F401
    import torch

    from dualdiff_engine.bench.clock import synchronize
    from dualdiff_engine.bench.gpu.record import Setting
    from dualdiff_engine.bench.gpu.step_parts import call_inputs, random_network

    found: dict[str, float] = {}

    def lap(name: str) -> None:
        synchronize(setting.device)
        found[name] = time.perf_counter() - START - sum(found.values())

    setting = Setting(Path(), 0.0, interpreted)
    with torch.inference_mode():
        lap("imports_s")
        unet = random_network(setting)
        lap("network_s")
        for name in ("first_step_s", "second_step_s"):
            unet(*call_inputs(unet, setting, setting.batches[0]))
            lap(name)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
