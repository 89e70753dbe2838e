"""What figures were measured on: the device, the versions, the commit."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "dualdiff-engine", "torch", "triton", "numpy", "diffusers", "transformers", "safetensors",
    "xformers", "onnxruntime", "onnxruntime-gpu", "onnx", "tensorrt", "tensorrt-rtx-cu13",
)  # fmt: skip


def facts(device: torch.device | str) -> dict[str, Any]:
    """The head of a record."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": str(device),
        "device_name": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {},
    }
    for package in PACKAGES:
        # not all of them are needed
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][package] = importlib.metadata.version(package)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["device_name"] = card.name
        found["capability"] = [card.major, card.minor]
        found["multiprocessors"] = card.multi_processor_count
        found["memory_bytes"] = card.total_memory
        found["versions"]["cuda"] = torch.version.cuda
    return found


def cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text("utf-8")
        return info.split("model name")[1].split(":", 1)[1].split("\n", 1)[0].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def tf32() -> dict[str, Any]:
    """Whether float32 products and convolutions may round their inputs to TF32 on a GPU."""
    return {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def commit() -> str | None:
    """The commit this file is at, with + when the tree has changes; None outside a checkout.

    DUALDIFF_COMMIT names it where the files were copied without their history.
    """
    if given := os.environ.get("DUALDIFF_COMMIT"):
        return given
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
