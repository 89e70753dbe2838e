"""Triton Inference Server's Python backend for a bundle; copied next to it as `model.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from dualdiff_engine import Background, Engine
from dualdiff_engine.errors import DualDiffError

OUTPUTS = ("IMAGE", "ANOMALY", "MASK", "RECIPE")


class TritonPythonModel:
    """Pairs for requests. Those that differ in their seeds alone are drawn as one batch."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        device = "cpu"
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        trust = config.get("parameters", {}).get("trust", {}).get("string_value") == "true"
        self.engine = Engine.from_bundle(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            device=device,
            max_batch=int(config["max_batch_size"]),
            trust=trust,
        )

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        groups: dict[Any, list[tuple[int, list[int]]]] = {}
        answers: dict[int, Any] = {}
        for index, request in enumerate(requests):
            try:
                seeds, wishes = _seeds(request), _wishes(request)
            except ValueError as error:
                answers[index] = _refusal(error)
                continue
            groups.setdefault(wishes, []).append((index, seeds))
        for members in groups.values():
            answers |= self._draw(requests[members[0][0]], members)
        return [answers[index] for index in range(len(requests))]

    def _draw(self, like: Any, members: list[tuple[int, list[int]]]) -> dict[int, Any]:
        """Answers of requests that wish for the same."""
        try:
            self._set_adapter(_text(like, "ADAPTER"))
            pairs = iter(
                self.engine.generate(
                    [seed for _, seeds in members for seed in seeds],
                    steps=_number(like, "STEPS", int),
                    guidance=_number(like, "GUIDANCE", float),
                    background=_background(like),
                    output_type="pil",
                )
            )
        except DualDiffError as error:
            return {index: _refusal(error) for index, _ in members}
        return {index: _answer([next(pairs) for _ in seeds]) for index, seeds in members}

    def _set_adapter(self, name: str | None) -> None:
        if name is not None and name != self.engine.active_adapter:
            self.engine.set_adapter(name)

    def finalize(self) -> None:
        self.engine.close()


def _array(request: Any, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _seeds(request: Any) -> list[int]:
    seeds = _array(request, "SEED")
    if seeds is None:
        raise ValueError("SEED is missing: give one per pair")
    return [int(seed) for seed in seeds.reshape(-1)]


def _same(request: Any, name: str) -> Any:
    """An input that all pairs of a request share; None when it is left out."""
    array = _array(request, name)
    if array is None:
        return None
    rows = [row.tobytes() if row.dtype != object else str(row.tolist()) for row in array]
    if len(set(rows)) != 1:
        raise ValueError(f"{name} differs within one request: send one request per value")
    return array[0]


def _number(request: Any, name: str, kind: type) -> Any:
    value = _same(request, name)
    return None if value is None else kind(value.reshape(-1)[0])


def _text(request: Any, name: str) -> str | None:
    value = _same(request, name)
    if value is None:
        return None
    found = value.reshape(-1)[0]
    return found.decode() if isinstance(found, bytes) else str(found)


def _background(request: Any) -> Background | None:
    picture = _same(request, "BACKGROUND")
    return None if picture is None else Background(picture, noise="fixed")


def _wishes(request: Any) -> tuple[Any, ...]:
    picture = _same(request, "BACKGROUND")
    return (
        _text(request, "ADAPTER"),
        _number(request, "STEPS", int),
        _number(request, "GUIDANCE", float),
        None if picture is None else (picture.shape, picture.tobytes()),
    )


def _answer(pairs: Sequence[Any]) -> Any:
    arrays = {
        "IMAGE": np.stack([np.asarray(pair.image) for pair in pairs]),
        "ANOMALY": np.stack([np.asarray(pair.anomaly) for pair in pairs]),
        "MASK": np.stack([np.asarray(pair.mask) for pair in pairs]),
        "RECIPE": np.array([[json.dumps(pair.recipe).encode()] for pair in pairs], dtype=object),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[name]) for name in OUTPUTS])


def _refusal(error: Exception) -> Any:
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(str(error)))
