"""Block sizes and launch options: what a GPU measured, else a default that compiles without spills.

The tables in `tuned/` are written by the GPU suite's autotuning, one file per compute capability,
and ship with the package. Nothing is tuned at run time.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"


@dataclass(frozen=True)
class Config:
    """blocks: constexpr arguments of the kernel by name; the rest are Triton's launch options."""

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2

    @property
    def arguments(self) -> dict[str, int]:
        """For a kernel launch."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}

    def __str__(self) -> str:
        return key(**self.arguments)


def key(**facts: object) -> str:
    """A name for a shape class: key(C=320, dtype=torch.float16) -> "C=320,dtype=float16"."""
    return ",".join(f"{k}={str(v).removeprefix('torch.')}" for k, v in sorted(facts.items()))


@functools.cache
def table(capability: tuple[int, int]) -> dict[str, dict[str, Config]]:
    """op -> shape class -> what was measured best on this kind of GPU; empty if none was."""
    path = TUNED / "sm_{}{}.json".format(*capability)
    if not path.exists():
        return {}
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))
    return {op: {k: Config(**row) for k, row in keys.items()} for op, keys in rows.items()}


def choose(op: str, shape_class: str, default: Config, device: torch.device) -> Config:
    """The tuned configuration of a shape class on this device, else the default."""
    if device.type != "cuda":
        return default
    measured = table(torch.cuda.get_device_capability(device))
    return measured.get(op, {}).get(shape_class, default)


def write(capability: tuple[int, int], rows: dict[str, dict[str, Config]]) -> Path:
    """Write what autotuning chose; returns the file."""
    path = TUNED / "sm_{}{}.json".format(*capability)
    path.parent.mkdir(exist_ok=True)
    plain = {op: {k: asdict(config) for k, config in keys.items()} for op, keys in rows.items()}
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n", "utf-8")
    return path
