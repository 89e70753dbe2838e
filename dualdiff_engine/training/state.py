"""The state of a run between two steps: one safetensors file, replaced whole or not at all.

It holds the losses, the parameters and both moments of AdamW. There is nothing else to keep: a step
depends only on the seed and its number, and the number is that of the losses. A checksum covers all
of it. A state is read only if it is right to the bit, has the shapes of the network, and is finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dualdiff_engine.adapters.files import not_finite
from dualdiff_engine.errors import OutputError, SettingsError, TrainingError
from dualdiff_engine.files import sha256_of_tensors, written_whole
from dualdiff_engine.settings import BRANCHES

STATE = "training_state.safetensors"
# the one entry of the file's metadata, since safetensors writes several in any order: JSON with
# what must be equal to resume, and a checksum over that and all tensors
HEADER, RUN, CHECKSUM = "state", "run", "sha256"
# AdamW's moments, under torch's names
_MOMENTS = ("exp_avg", "exp_avg_sq")
_REMEDY = "remove it to start over, or choose another folder"


def require_finite(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: Tensor
) -> None:
    """Raises TrainingError when a loss, a parameter or a moment is NaN or infinite."""
    name = not_finite(_tensors(parameters, optimizer, losses))
    if name is not None:
        raise TrainingError(
            f"{name} is not finite after step {len(losses)} (losses {losses[-1].tolist()}): train "
            "anew in another folder with a lower learning_rate, more warmup or dtype float32; the "
            "last saved state and its files are kept"
        )


def save(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
    run: Mapping[str, Any],
) -> None:
    """losses float32 [steps done, 2 branches]; run: what must be equal to resume.

    Raises TrainingError for what is not finite, before anything is written, and OutputError.
    """
    require_finite(parameters, optimizer, losses)
    here = _tensors(parameters, optimizer, losses)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in here.items()}
    header = {RUN: run, CHECKSUM: _checksum(content, run)}
    with written_whole(path) as partial:
        save_file(content, partial, {HEADER: json.dumps(header, sort_keys=True)})


def steps_done(path: Path, run: Mapping[str, Any]) -> int:
    """The number of steps in a saved state, 0 if there is none. All of it is read and checked.

    Raises SettingsError when the state belongs to another run, naming what differs, and OutputError
    when the file is damaged.
    """
    if not path.exists():
        return 0
    content, theirs = _read(path)
    ours = json.loads(json.dumps(run))
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            raise SettingsError(
                f"{path.parent} holds a run with another {name}{_difference(theirs, ours, name)}: "
                "choose another folder, or resume with the same options"
            )
    return len(content["losses"])


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], name: str) -> str:
    values = theirs.get(name), ours.get(name)
    if any(isinstance(value, list) or len(str(value)) > 40 for value in values):
        return ""
    return f" ({values[0]!r}, not {values[1]!r})"


def restore(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> Tensor:
    """Continue where `save` was: fills parameters and optimizer, returns the losses.

    Raises OutputError, before anything is filled, when the file is damaged or does not fit.
    """
    content, _ = _read(path)
    losses = content.pop("losses")
    with _damage_named(path):
        _require_fit(content, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            device = parameter.device
            parameter.copy_(content[f"parameter.{name}"])
            optimizer.state[parameter] = {
                "step": torch.tensor(float(len(losses)), device=device),
                **{m: content[f"{m}.{name}"].to(device) for m in _MOMENTS},
            }
    return losses


def _tensors(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, losses: Tensor
) -> dict[str, Tensor]:
    """What a state consists of, by its names in the file, where it is now."""
    moments = {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in parameters.items()
        for moment in _MOMENTS
    }
    trained = {f"parameter.{name}": parameter for name, parameter in parameters.items()}
    return {"losses": losses, **trained, **moments}


def _checksum(content: Mapping[str, Tensor], run: Mapping[str, Any]) -> str:
    """Of names, dtypes, shapes and bytes of all tensors, and of the run."""
    about = json.dumps(run, sort_keys=True)
    return hashlib.sha256(f"{about}\n{sha256_of_tensors(content)}".encode()).hexdigest()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a state, right to the bit and finite, and the run it belongs to.

    Raises OutputError.
    """
    with _damage_named(path):
        if not path.is_file():
            raise ValueError("it is not a regular file")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # a file of safetensors is no mapping: `keys` is the only way to its names
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if HEADER not in metadata:
        raise OutputError(
            f"{path} has no checksum, an earlier version of this program wrote it: {_REMEDY}"
        )
    with _damage_named(path):
        header = json.loads(metadata[HEADER])
        run: dict[str, Any] = header[RUN]
        if header[CHECKSUM] != _checksum(content, run):
            raise ValueError("its content does not match its checksum")
        losses = content["losses"]
        if losses.dtype != torch.float32 or losses.shape != (max(1, len(losses)), len(BRANCHES)):
            raise ValueError(f"its losses are {losses.dtype} {list(losses.shape)}")
        if name := not_finite(content):
            raise ValueError(f"{name} holds NaN or infinity")
    return content, run


def _require_fit(content: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Every parameter with its moments, and nothing else, in its dtype and shape.

    Raises ValueError. A shape that broadcasts would be copied without a word.
    """
    kinds = ("parameter", *_MOMENTS)
    expected = {f"{kind}.{name}": p for name, p in parameters.items() for kind in kinds}
    if odd := sorted(set(content) ^ set(expected)):
        raise ValueError(f"{odd[0]} is {'missing' if odd[0] in expected else 'not of this run'}")
    for name, parameter in expected.items():
        tensor = content[name]
        if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, not {parameter.dtype} "
                f"{list(parameter.shape)}"
            )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever reading a damaged file raises, as OutputError with the remedy."""
    try:
        yield
    except (
        *(SafetensorError, OSError, ValueError, KeyError, RuntimeError),
        *(AttributeError, TypeError),
    ) as error:
        raise OutputError(f"{path} is damaged ({error}): {_REMEDY}") from error
