"""Which backend serves each call of a network here: what was measured, or the usual choice.

On a GPU an engine measures by itself the first time, within LIMIT_S; on a CPU `dualdiff tune` does.
A start after that reads one small file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.model import binding
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.ops import Ops, measure, record
from dualdiff_engine.ops.measure import OpCall
from dualdiff_engine.ops.record import Record

logger = logging.getLogger(__name__)

MODES = ("auto", "never")
LIMIT_S = 60.0

Places = Mapping[str, Mapping[str, Sequence[str]]]
# (measured so far, in all, the call, its seconds by backend)
Report = Callable[[int, int, OpCall, Mapping[str, float]], None]


@dataclass(frozen=True)
class Network:
    """What the calls of a step depend on. size: of the latents; tokens: of a prompt."""

    config: UNetConfig
    size: int
    tokens: int

    def calls(self, pairs: int) -> dict[str, dict[str, list[OpCall]]]:
        """Plain and with a background: place -> calls."""
        return {
            kind: binding.op_calls(
                self.config, pairs, self.size, self.tokens, background=kind == "background"
            )
            for kind in ("plain", "background")
        }

    def places(self) -> Places:
        """Plain and with a background: place -> its calls by name."""
        return {
            kind: {place: [call.name for call in calls] for place, calls in by_place.items()}
            for kind, by_place in self.calls(1).items()
        }


def check_mode(tune: str) -> str:
    if tune not in MODES:
        raise SettingsError(f"tune must be one of {', '.join(MODES)}, got {tune!r}")
    return tune


def pairs_to_measure(device: torch.device, batch: int) -> int:
    """On a CPU one pair has rows enough for the rate of a product, and is soon measured."""
    return batch if device.type == "cuda" else 1


def tune(
    network: Network,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    limit_s: float = LIMIT_S,
    report: Report = lambda *_: None,
) -> Record:
    """Measure every call of a step and keep the result. Raises OSError when it cannot be kept."""
    pairs = pairs_to_measure(device, batch)
    kinds = network.calls(pairs)
    calls = {c.name: c for places in kinds.values() for listed in places.values() for c in listed}
    seconds: dict[str, dict[str, float]] = {}
    measured = measure.measured(list(calls.values()), device, dtype, limit_s)
    for number, (call, times) in enumerate(measured, 1):
        seconds[call.name] = times
        report(number, measure.PASSES * len(calls), call, times)
    choices = {name: measure.fastest(times) for name, times in seconds.items()}
    places = {
        kind: {place: [call.name for call in listed] for place, listed in by_place.items()}
        for kind, by_place in kinds.items()
    }
    found = Record(choices, places, seconds)
    record.write(record.Key.of(device, dtype, network), pairs, found)
    return found


def settle(
    ops: Ops,
    network: Network,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    mode: str = "auto",
) -> tuple[Ops, Places]:
    """The ops with what was measured for this network in their table, and where they are called.

    mode: auto measures on a GPU where nothing is recorded; never takes records only.
    """
    if any(row.where for row in ops.table):
        # the caller named classes: nothing is left to choose
        return ops, network.places()
    if not ops.free:
        return ops, {}
    key = record.Key.of(device, dtype, network)
    found = record.read(key, pairs_to_measure(device, batch))
    if found is None and mode == "auto" and device.type == "cuda":
        logger.warning("measuring which kernels are fastest here, once, up to %g s", LIMIT_S)
        try:
            found = tune(network, device, dtype, batch)
        except OSError as error:
            logger.warning("measured choices cannot be kept: %s", error)
    if found is None:
        return ops, {}
    return binding.with_choices(ops, found.choices, device, dtype), found.places
