"""A bundle as a model of NVIDIA's Triton Inference Server: repository, config, warm-up."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder.bundle import check_files, read_manifest
from dualdiff_engine.export.graph.write import new_folder

# a file of the model's warmup folder: the number one, as INT32
ONE = "one"
MODEL = Path(__file__).with_name("triton_model.py")


@dataclass(frozen=True)
class Serving:
    """How to serve.

    Args:
        name: of the model: letters, digits, and ._- (not first).
        device: `cpu` or `gpu`.
        instances: model instances per device.
        max_batch: largest number of pairs that requests are joined to.
        delay_us: microseconds that requests may wait for one another.
        trust: run the bundle's TensorRT engines even if another user built them.

    Raises:
        SettingsError: a value is out of its range.
    """

    name: str = "dualdiff"
    device: str = "gpu"
    instances: int = 1
    max_batch: int = 8
    delay_us: int = 0
    trust: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.name):
            raise SettingsError(
                f"the model name may hold letters, digits and ._- (not first), got {self.name!r}"
            )
        if self.device not in ("cpu", "gpu"):
            raise SettingsError(f"device must be cpu or gpu, got {self.device!r}")
        if min(self.instances, self.max_batch) < 1 or self.delay_us < 0:
            raise SettingsError("instances and max_batch must be at least 1, delay_us at least 0")


def write_repository(bundle: str | Path, out: str | Path, serving: Serving | None = None) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server that serves a bundle.

    Args:
        bundle: a folder by `write_bundle`.
        out: the new repository, absent or empty. It receives NAME/config.pbtxt, NAME/1/model.py and
            NAME/1/bundle.
        serving: see `Serving`.

    Raises:
        SettingsError: `out` is not empty.
        BackendError: the bundle is damaged or was exported for smaller batches.
    """
    bundle, serving = Path(bundle), serving or Serving()
    manifest = read_manifest(bundle)
    check_files(bundle, manifest, hashes=True)
    if serving.max_batch > manifest["max_batch"]:
        raise BackendError(
            f"max_batch {serving.max_batch} is above {manifest['max_batch']}, the most that "
            f"{bundle} was exported for: pass less or write the bundle with a larger --max-batch"
        )
    with new_folder(Path(out)) as folder:
        version = folder / serving.name / "1"
        version.mkdir(parents=True)
        (folder / serving.name / "config.pbtxt").write_text(config(manifest, serving), "utf-8")
        warmup = folder / serving.name / "warmup"
        warmup.mkdir()
        (warmup / ONE).write_bytes((1).to_bytes(4, "little"))
        shutil.copyfile(MODEL, version / "model.py")
        shutil.copytree(bundle, version / "bundle")


def config(manifest: dict[str, Any], serving: Serving) -> str:
    """config.pbtxt, as of the server's model_config.proto."""
    first = manifest["first"]
    inputs = [
        ("SEED", "TYPE_INT64", "1", False),
        ("STEPS", "TYPE_INT32", "1", True),
        ("GUIDANCE", "TYPE_FP32", "1", True),
        ("ADAPTER", "TYPE_STRING", "1", True),
        # which adapters need it, and which refuse it, the model says
        ("BACKGROUND", "TYPE_UINT8", "-1, -1, 3", True),
    ]
    outputs = [
        ("IMAGE", "TYPE_UINT8", "-1, -1, 3"),
        ("ANOMALY", "TYPE_UINT8", "-1, -1, 3"),
        ("MASK", "TYPE_UINT8", "-1, -1"),
        ("RECIPE", "TYPE_STRING", "1"),
    ]
    parts = [
        f'name: "{serving.name}"\nbackend: "python"\nmax_batch_size: {serving.max_batch}',
        *(
            f'input [ {{ name: "{name}" data_type: {kind} dims: [ {dims} ] '
            f"optional: {str(optional).lower()} }} ]"
            for name, kind, dims, optional in inputs
        ),
        *(
            f'output [ {{ name: "{name}" data_type: {kind} dims: [ {dims} ] }} ]'
            for name, kind, dims in outputs
        ),
        f"instance_group [ {{ count: {serving.instances} kind: KIND_{serving.device.upper()} }} ]",
        f"dynamic_batching {{ max_queue_delay_microseconds: {serving.delay_us} }}",
        _parameter("adapter", first),
        *([_parameter("trust", "true")] if serving.trust else []),
        _warmup(manifest["adapters"][first]["background"]),
    ]
    return "\n".join(parts) + "\n"


def _parameter(name: str, value: str) -> str:
    """A parameter that the model reads."""
    quoted = json.dumps(value, ensure_ascii=False)
    return f'parameters [ {{ key: "{name}" value: {{ string_value: {quoted} }} }} ]'


def _warmup(background: bool) -> str:
    """One pair in one step before the model is ready: sessions are built, kernels chosen."""
    inputs = {
        "SEED": "data_type: TYPE_INT64 dims: [ 1 ] zero_data: true",
        "STEPS": f'data_type: TYPE_INT32 dims: [ 1 ] input_data_file: "{ONE}"',
    }
    if background:
        inputs["BACKGROUND"] = "data_type: TYPE_UINT8 dims: [ 64, 64, 3 ] zero_data: true"
    lines = [f'  inputs {{ key: "{name}" value {{ {what} }} }}' for name, what in inputs.items()]
    return 'model_warmup [ {\n  name: "one pair"\n  batch_size: 1\n' + "\n".join(lines) + "\n} ]"
