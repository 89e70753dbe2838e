"""Triton Inference Server's Python backend for a bundle; copied next to it as `model.py`."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from dualdiff_engine import Background, Engine
from dualdiff_engine.device import is_device_lost
from dualdiff_engine.errors import BackendError, DualDiffError, PairError
from dualdiff_engine.pair import Fault, Pair
from dualdiff_engine.settings import require_seed

logger = logging.getLogger(__name__)

OUTPUTS = ("IMAGE", "ANOMALY", "MASK", "RECIPE")
# seconds for the server to fetch the last answers before an instance with a lost GPU ends
LAST_WORDS = 2.0


class Wishes(NamedTuple):
    """What the pairs of a request share; requests of equal wishes are drawn as one batch.

    background: dtype, shape and bytes of the picture.
    """

    adapter: str
    steps: Any
    guidance: Any
    background: tuple[str, tuple[int, ...], bytes] | None

    def options(self) -> dict[str, Any]:
        """Arguments of `Engine.generate`."""
        background = None
        if self.background is not None:
            dtype, shape, content = self.background
            picture = np.frombuffer(content, dtype).reshape(shape).copy()
            background = Background(picture, noise="fixed")
        return {"steps": self.steps, "guidance": self.guidance, "background": background}


class TritonPythonModel:
    """Pairs for requests. An error is the answer to the request that caused it, and to no other."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        device = "cpu"
        if args["model_instance_kind"] == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        self.engine = Engine.from_bundle(
            Path(args["model_repository"]) / args["model_version"] / "bundle",
            adapter=_parameter(config, "adapter"),
            device=device,
            max_batch=int(config["max_batch_size"]),
            trust=_parameter(config, "trust") == "true",
        )
        # of a request that names none, whatever the one before it asked for
        self.default = self.engine.active_adapter
        self.lost: BackendError | None = None

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        groups: dict[Wishes, list[tuple[int, list[int]]]] = {}
        answers: dict[int, Any] = {}
        for index, request in enumerate(requests):
            try:
                seeds, wishes = _seeds(request), _wishes(request, str(self.default))
            # whatever a client can send, its neighbours are answered
            except Exception as error:
                answers[index] = _refusal(error)
            else:
                groups.setdefault(wishes, []).append((index, seeds))
        for wishes, members in groups.items():
            answers |= self._draw(wishes, members)
        return [answers[index] for index in range(len(requests))]

    def _draw(self, wishes: Wishes, members: list[tuple[int, list[int]]]) -> dict[int, Any]:
        """Answers of requests that wish for the same."""
        error: Exception | None = self.lost
        if error is None:
            try:
                drawn = iter(self._outcomes(wishes, [s for _, seeds in members for s in seeds]))
                return {index: _answer([next(drawn) for _ in seeds]) for index, seeds in members}
            except Exception as caught:
                error = caught
                if is_device_lost(error, self.engine.device):
                    error = self._end(error)
                elif len(members) > 1:
                    # alone, only the one at fault fails
                    alone = [self._draw(wishes, [member]) for member in members]
                    return {index: answer for part in alone for index, answer in part.items()}
        return {index: _refusal(error) for index, _ in members}

    def _outcomes(self, wishes: Wishes, seeds: list[int]) -> list[Pair | Fault]:
        """Per seed, in order, the pair, or why it cannot be used."""
        if wishes.adapter != self.engine.active_adapter:
            self.engine.set_adapter(wishes.adapter)
        faults: list[Fault] = []
        pairs = self.engine.generate(
            seeds, **wishes.options(), output_type="pil", on_fault=faults.append
        )
        good, bad = deque(pairs), deque(faults)
        return [
            good.popleft() if good and good[0].seed == seed else bad.popleft() for seed in seeds
        ]

    def _end(self, error: Exception) -> BackendError:
        """Let this process end: no later call on its GPU can succeed. Returns the answer to all.

        The server starts it again, or reports the model as not ready, by its version: see "Triton
        Inference Server" in export/README.md.
        """
        reason = str(error).partition("\n")[0]
        self.lost = BackendError(
            f"the GPU of this instance failed, so it ends; send the request again ({reason})"
        )
        logger.error("%s", self.lost)
        timer = threading.Timer(LAST_WORDS, os._exit, (1,))
        timer.daemon = True
        timer.start()
        return self.lost

    def finalize(self) -> None:
        self.engine.close()


def _parameter(config: dict[str, Any], name: str) -> str | None:
    value = config.get("parameters", {}).get(name, {}).get("string_value")
    return None if value is None else str(value)


def _array(request: Any, name: str) -> np.ndarray | None:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _seeds(request: Any) -> list[int]:
    seeds = _array(request, "SEED")
    if seeds is None or seeds.size == 0:
        raise ValueError("SEED is missing: give one per pair")
    return [require_seed(seed) for seed in seeds.reshape(-1).tolist()]


def _same(request: Any, name: str) -> Any:
    """An input that all pairs of a request share; None when it is left out."""
    array = _array(request, name)
    if array is None:
        return None
    rows = [row.tobytes() if row.dtype != object else str(row.tolist()) for row in array]
    if not rows or array.size == 0:
        raise ValueError(f"{name} is empty: give a value per pair, or leave it out")
    if len(set(rows)) != 1:
        raise ValueError(f"{name} differs within one request: send one request per value")
    return array[0]


def _number(request: Any, name: str) -> Any:
    value = _same(request, name)
    # a Python number; the engine refuses what is not whole, finite or in range
    return None if value is None else value.reshape(-1)[0].item()


def _text(request: Any, name: str) -> str | None:
    value = _same(request, name)
    if value is None:
        return None
    text = value.reshape(-1)[0]
    return text.decode() if isinstance(text, bytes) else str(text)


def _wishes(request: Any, default: str) -> Wishes:
    picture = _same(request, "BACKGROUND")
    return Wishes(
        _text(request, "ADAPTER") or default,
        _number(request, "STEPS"),
        _number(request, "GUIDANCE"),
        None if picture is None else (picture.dtype.str, picture.shape, picture.tobytes()),
    )


def _answer(outcomes: Sequence[Pair | Fault]) -> Any:
    """Of a request whose pairs are all there; else the first fault."""
    pairs = [outcome for outcome in outcomes if isinstance(outcome, Pair)]
    for outcome in outcomes:
        if isinstance(outcome, Fault):
            return _refusal(PairError(outcome.seed, outcome.reason))
    arrays = {
        "IMAGE": np.stack([np.asarray(pair.image) for pair in pairs]),
        "ANOMALY": np.stack([np.asarray(pair.anomaly) for pair in pairs]),
        "MASK": np.stack([np.asarray(pair.mask) for pair in pairs]),
        "RECIPE": np.array([[json.dumps(pair.recipe).encode()] for pair in pairs], dtype=object),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[name]) for name in OUTPUTS])


def _refusal(error: Exception) -> Any:
    text = str(error)
    if not isinstance(error, DualDiffError | ValueError):
        # of a library: the class may say more than the text
        text = f"{type(error).__name__}: {text}"
    return pb_utils.InferenceResponse([], error=pb_utils.TritonError(text))
