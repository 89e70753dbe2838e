"""`dualdiff doctor`: what this machine offers, and which backend serves each op on it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable
from typing import Any

import typer

from dualdiff_engine.cli.options import Backend, Device, Dtype, Json

# distribution -> the extra that brings it
OPTIONAL = {
    "triton": "triton",
    "xformers": "xformers",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxruntime-gpu": "ort-gpu",
    "tensorrt": "tensorrt",
    "tensorrt-rtx-cu13": "tensorrt-rtx",
    "torch-fidelity": "eval",
    "lpips": "eval",
}


def doctor(
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Show versions, devices, and which backend runs each operation."""
    from dualdiff_engine import ops
    from dualdiff_engine.device import device_of, devices, dtype_of
    from dualdiff_engine.pair import versions

    chosen_device = device_of(device)
    chosen_dtype = dtype_of(dtype, chosen_device)
    bound = ops.bind(backend, device=chosen_device, dtype=chosen_dtype)
    report: dict[str, Any] = {
        "versions": {"python": platform.python_version(), **versions()},
        "optional": {name: _installed(name) for name in OPTIONAL},
        "devices": devices(),
        "device": str(chosen_device),
        "dtype": str(chosen_dtype).removeprefix("torch."),
        "ops": [row._asdict() for row in bound.table],
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    print_table(report["versions"].items())
    print_table(
        (name, version or f"not installed: pip install 'dualdiff-engine[{OPTIONAL[name]}]'")
        for name, version in report["optional"].items()
    )
    print_table(
        (name, ", ".join(f"{what} {much}" for what, much in device.items()) or "none")
        for name, device in report["devices"].items()
    )
    typer.echo(f"\noperations on {report['device']} in {report['dtype']}:")
    print_table((row.name, f"{row.backend:<12}{row.reason}") for row in bound.table)


def _installed(distribution: str) -> str | None:
    """Its version, without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_table(rows: Iterable[tuple[str, object]]) -> None:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")
