"""The state of a run between two steps: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualdiff_engine.errors import OutputError, SettingsError
from dualdiff_engine.files import written_whole

STATE = "training_state.safetensors"
# AdamW's moments, under torch's names
_MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
    run: Mapping[str, Any],
) -> None:
    """losses [steps done, 2 branches]; run: what must be equal to resume. Raises OutputError."""
    tensors = {"losses": losses.contiguous()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    with written_whole(path) as partial:
        save_file(tensors, partial, {"run": json.dumps(run, sort_keys=True)})


def steps_done(path: Path, run: Mapping[str, Any]) -> int:
    """The number of steps in a saved state, 0 if there is none.

    Raises SettingsError when the state belongs to another run, naming what differs, and OutputError
    when the file is damaged.
    """
    if not path.exists():
        return 0
    with _reading(path) as file:
        theirs = json.loads((file.metadata() or {})["run"])
        done = int(file.get_slice("losses").get_shape()[0])
    ours = json.loads(json.dumps(run))
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            raise SettingsError(
                f"{path.parent} holds a run with another {name}{_difference(theirs, ours, name)}: "
                "choose another folder, or resume with the same options"
            )
    return done


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str) -> str:
    values = theirs.get(name), ours.get(name)
    if any(isinstance(value, list) or len(str(value)) > 40 for value in values):
        return ""
    return f" ({values[0]!r}, not {values[1]!r})"


def restore(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Tensor:
    """Continue where `save` was: fills parameters and optimizer, returns the losses.

    Raises OutputError when the file is damaged.
    """
    with _reading(path) as file, torch.no_grad():
        losses: Tensor = file.get_tensor("losses")
        for name, parameter in parameters.items():
            device = parameter.device
            parameter.copy_(file.get_tensor(f"parameter.{name}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses)), device=device),
                **{m: file.get_tensor(f"{m}.{name}").to(device) for m in _MOMENTS},
            }
    return losses


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise OutputError(
            f"{path} is damaged ({error}): remove it to start over, or choose another folder"
        ) from error
