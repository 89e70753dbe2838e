"""The state of a run between two steps: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualdiff_engine.errors import OutputError, SettingsError

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
    """losses [steps done, 2 branches]; run: what a continued run must share. Raises OutputError."""
    tensors = {"losses": losses.contiguous()}
    for name, parameter in parameters.items():
        tensors[f"parameter.{name}"] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, {"run": json.dumps(run, sort_keys=True)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"cannot write {path} ({error}): free some space") from error


def restore(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: Mapping[str, Any],
) -> Tensor:
    """Continue where `save` was: fills parameters and optimizer, returns the losses.

    Raises SettingsError when the state is of another run, naming what differs.
    """
    try:
        with safe_open(path, "pt") as file:
            theirs = json.loads((file.metadata() or {})["run"])
            _check_same(path, theirs, json.loads(json.dumps(run)))
            losses = file.get_tensor("losses")
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(f"parameter.{name}"))
                    moments = {m: file.get_tensor(f"{m}.{name}") for m in _MOMENTS}
                    optimizer.state[parameter] = {
                        "step": torch.tensor(float(len(losses))),
                        **{m: t.to(parameter.device) for m, t in moments.items()},
                    }
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        if isinstance(error, SettingsError):
            raise
        raise OutputError(
            f"{path} is damaged ({error}): remove it to start over, or choose another folder"
        ) from error
    return losses


def _check_same(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            raise SettingsError(
                f"{path.parent} holds a run with {name} {theirs.get(name)!r}, this one has "
                f"{ours.get(name)!r}: choose another folder, or the same {name}"
            )
