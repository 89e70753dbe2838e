"""What the parts of the GPU suite run on, and the file that each leaves."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.bench.machine import facts as machine_facts
from dualdiff_engine.bench.machine import tf32
from dualdiff_engine.bench.step.case import MODELS, SCALE, Case


@dataclass(frozen=True)
class Setting:
    """What the parts run on. deadline: of this process's part, on `time.monotonic`."""

    folder: Path
    deadline: float
    interpreted: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.interpreted else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.interpreted else torch.bfloat16

    @property
    def model(self) -> str:
        return "tiny" if self.interpreted else "sd15"

    @property
    def batches(self) -> tuple[int, ...]:
        """Pairs per step; the first is what the kernels are tuned for."""
        return (1,) if self.interpreted else (32, 1)

    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def case(self, batch: int, *, background: bool) -> Case:
        size, scale = MODELS[self.model]["sample_size"], SCALE[self.model]
        return Case(self.model, batch, 50, size, size, 2.5, background, 0, scale)


class Record:
    """A JSON file that is whole after every addition, so that a cut run leaves what it had."""

    def __init__(self, part: str, setting: Setting) -> None:
        self.path = setting.folder / f"{part}.json"
        self.data: dict[str, Any] = {
            "part": part,
            "interpreted": setting.interpreted,
            **machine_facts(setting.device),
            "tf32": tf32(),
            "notes": [],
        }

    def note(self, text: str) -> None:
        print(text, flush=True)
        self.data["notes"].append(text)
        self.save()

    def add(self, kind: str, rows: list[dict[str, Any]]) -> None:
        self.data.setdefault(kind, []).extend(rows)
        self.save()

    def save(self) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", "utf-8")
