"""NVIDIA's Triton Inference Server, as a Python model sees it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dualdiff_engine.export.serve.triton_server import MODEL


class Tensor:
    """What the server hands to a Python model, and takes from it."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array

    def as_numpy(self) -> np.ndarray:
        return self.array


def load_model(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """model.py, with the server's module in its place."""

    def find(request: dict[str, np.ndarray], name: str) -> Tensor | None:
        return Tensor(name, request[name]) if name in request else None

    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor = Tensor
    utils.TritonError = lambda text: text
    utils.get_input_tensor_by_name = find
    utils.InferenceResponse = lambda tensors, error=None: SimpleNamespace(
        error=error, **{tensor.name: tensor.array for tensor in tensors}
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    spec = importlib.util.spec_from_file_location("model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def served(
    model: ModuleType,
    repository: Path,
    name: str = "pairs",
    most: int = 4,
    parameters: Mapping[str, str] | None = None,
) -> Any:
    """A model as the server makes one; parameters: of its config."""
    strings = {key: {"string_value": value} for key, value in (parameters or {}).items()}
    serving = model.TritonPythonModel()
    serving.initialize(
        {
            "model_config": json.dumps({"max_batch_size": most, "parameters": strings}),
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": str(repository / name),
            "model_version": "1",
        }
    )
    return serving
