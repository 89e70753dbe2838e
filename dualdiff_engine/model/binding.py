"""Each place of the network that calls an op is bound to the backend of its own shapes.

Which calls a step makes is traced on shapes alone. A place is a module's `ops` or `out_ops`; what
it is bound to is fixed before the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import NAMES, Choice, Ops, backend_op, reference, serves
from dualdiff_engine.ops.measure import OpCall, Shapes, shape_class

META = torch.device("meta")
PLACES = ("ops", "out_ops")


def places(unet: DualUNet) -> dict[str, tuple[nn.Module, str]]:
    """Name -> the module and the attribute that holds its ops."""
    return {
        f"{name}.{attribute}": (module, attribute)
        for name, module in unet.named_modules()
        for attribute in PLACES
        if isinstance(getattr(module, attribute, None), Ops)
    }


@torch.inference_mode()
def _traced(
    config: UNetConfig, pairs: int, size: int, tokens: int, background: bool
) -> list[tuple[str, str, Shapes]]:
    """(place, op, shapes) of every call of a guided step, in the order of execution."""
    calls: list[tuple[str, str, Shapes]] = []

    def recorder(place: str, op: str) -> Callable[..., Tensor]:
        def record(*arguments: Any) -> Tensor:
            shapes = (tuple(x.shape) if isinstance(x, Tensor) else x for x in arguments)
            calls.append((place, op, tuple(shapes)))
            out: Tensor = getattr(reference, op)(*arguments)
            return out

        return record

    def recording(place: str) -> Ops:
        recorders: dict[str, Any] = {op: recorder(place, op) for op in NAMES}
        return Ops(**recorders, table=())

    with META:
        unet = DualUNet(config, recording(""), background=background)
        for name, (module, attribute) in places(unet).items():
            setattr(module, attribute, recording(name))
        time = unet.time_inputs(torch.zeros(1))[0]
        text = unet.text_inputs(torch.zeros(2, 2, tokens, config.context_width))
        shares = None
        if background:
            shares = unet.background_shares(torch.zeros(2, 4, size, size), time, text)
        # those are computed once, for all steps or all pairs
        calls.clear()
        unet(torch.zeros(2, 1, pairs, config.in_channels, size, size), time, text, shares)
    return calls


def op_calls(
    config: UNetConfig, pairs: int, size: int, tokens: int, *, background: bool
) -> dict[str, list[OpCall]]:
    """Place -> its calls in a guided step of a batch of pairs. A call's class is that of one pair.

    size: of the latents. tokens: of a prompt. background: whether the step has one.
    """
    one = _traced(config, 1, size, tokens, background)
    many = _traced(config, pairs, size, tokens, background)
    found: dict[str, list[OpCall]] = {}
    for (place, op, shapes), (_, _, batched) in zip(one, many, strict=True):
        found.setdefault(place, []).append(OpCall(op, shape_class(op, shapes), batched))
    return found


def rebind(unet: DualUNet, ops: Ops, calls: Mapping[str, Sequence[str]]) -> None:
    """Give every place the ops of its own calls, as `ops.table` says.

    calls: place -> the calls "op@class" that it makes.
    """
    exceptions = {row.name: row for row in ops.table if row.where}
    # places of equal choice share one set
    variants: dict[tuple[tuple[str, str], ...], Ops] = {}
    for name, (module, attribute) in places(unet).items():
        rows = [exceptions[call] for call in calls.get(name, ()) if call in exceptions]
        chosen = {row.op: row.backend for row in rows}
        key = tuple(sorted(chosen.items()))
        if key not in variants:
            bound: dict[str, Any] = {op: backend_op(backend, op) for op, backend in chosen.items()}
            variants[key] = replace(ops, **bound)
        setattr(module, attribute, variants[key])


def with_choices(
    ops: Ops, choices: Mapping[str, str], device: torch.device, dtype: torch.dtype
) -> Ops:
    """The ops with measured choices ("op@class" -> backend) in their table, where they hold here.

    Ops whose backend the caller named keep it.
    """
    usual = {row.op: row for row in ops.table if not row.where}
    rows = []
    for name, backend in choices.items():
        op, _, where = name.partition("@")
        if op not in usual or op not in ops.free or backend == usual[op].backend:
            continue
        ok, reason = serves(backend, op, device, dtype)
        if ok:
            rows.append(Choice(op, backend, f"measured as the fastest here: {reason}", where))
    return replace(ops, table=(*ops.table, *rows))
