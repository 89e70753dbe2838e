"""The calls that one denoiser step makes, as shapes, and the work that they cannot do without."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dualdiff_engine.bench.step.case import MODELS, TEXT_TOKENS, network_config
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import NAMES, Ops, proof, reference

META = torch.device("meta")
GUIDANCE = 2.5


@dataclass(frozen=True)
class Spec:
    """A call of an op as the network makes it: shapes of tensors, other arguments as they are."""

    op: str
    arguments: tuple[Any, ...]

    @property
    def label(self) -> str:
        """Of every tensor argument the shape, as in "2x512x960 2x960x320 8"."""
        given = [x for x in self.arguments if x is not None]
        return " ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in given)


class Watch(Protocol):
    """A context around a step that learns what runs inside an op."""

    def __enter__(self) -> object: ...

    def __exit__(self, *error: Any) -> Any: ...

    def inside_op(self) -> AbstractContextManager[object]: ...


def trace(
    model: str,
    pairs: int,
    size: int | None = None,
    background: bool = False,
    watch: Watch | None = None,
) -> Counter[Spec]:
    """How often a guided step of a batch of pairs makes each call.

    size: of the latents. watch: entered around the step; learns what runs inside an op.
    """
    calls: Counter[Spec] = Counter()

    def recorder(op: str) -> Callable[..., Tensor]:
        def record(*arguments: Any) -> Tensor:
            shapes = (tuple(x.shape) if isinstance(x, Tensor) else x for x in arguments)
            calls[Spec(op, tuple(shapes))] += 1
            with watch.inside_op() if watch else nullcontext():
                return getattr(reference, op)(*arguments)

        return record

    recorders: dict[str, Any] = {op: recorder(op) for op in NAMES}
    ops = Ops(**recorders, table=())
    size = size or MODELS[model]["sample_size"]
    with torch.inference_mode(), META:
        unet = DualUNet(network_config(model), ops, background=background)
        bias = unet.time_inputs(torch.zeros(1))[0]
        text = unet.text_inputs(torch.zeros(2, 2, TEXT_TOKENS, unet.config.context_width))
        shares = None
        if background:
            shares = unet.background_shares(torch.zeros(2, 4, size, size), bias, text)
        # those were made once, for all steps or all pairs
        calls.clear()
        with watch or nullcontext():
            noise = unet(torch.zeros(2, 1, pairs, 4, size, size), bias, text, shares)
            ops.guided_step(noise, GUIDANCE)
    return calls


def coupled(calls: Mapping[Spec, int], pairs: int) -> Counter[Spec]:
    """The same sites in the other forms that a coupling can give them, as often as traced.

    Self-attention over both branches' keys, text attention aligned, a merge for the exchange.
    """
    found: Counter[Spec] = Counter()
    for spec, count in calls.items():
        first, second, *rest = spec.arguments
        if spec.op == "exchange":
            channels = first[2]
            found[Spec("merge", (first, (2, channels, channels), first))] += count
        elif spec.op == "attention" and second[0] == first[0] and second[1] == first[1]:
            half = (first[0] // 2, *first[1:])
            found[Spec("attention", (first, half, half, rest[1], half, half))] += count
        elif spec.op == "attention":
            query = (2, first[0] // 2, pairs, first[1] // pairs, first[2])
            found[Spec("align", proof.alignment(query, second[1], rest[1]))] += count
    return found


# more rows than this ask for no other kernel; keys do, unless a tile of them divides both numbers
FEW_ROWS, FEW_KEYS = 16, 256


def few_rows(spec: Spec) -> Spec:
    """The same call of few rows, for which the same kernels are compiled: weights are all it holds.

    The kernels take numbers of rows as run-time arguments; what they know of keys, positions of a
    map and channels stays.
    """
    first, second, *rest = spec.arguments

    def rows(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        return (*(1 for _ in shape[:axis]), FEW_ROWS, *shape[axis + 1 :])

    if spec.op == "attention":
        query = (first[0] // second[0], FEW_ROWS, first[2])
        source, _, *more = (
            (1, FEW_KEYS if x[1] % FEW_KEYS == 0 else x[1], x[2])
            for x in (second, rest[0], *rest[2:])
        )
        return Spec(spec.op, (query, source, source, rest[1], *more))
    if spec.op == "group_norm_silu":
        return Spec(spec.op, ((1, *first[1:]), second, *rest))
    if spec.op in ("exchange", "merge"):
        positions = first[1] if first[1] % FEW_ROWS else FEW_ROWS
        both = (2, positions, first[2])
        return Spec(spec.op, (both, second, *rest[:-1], both))
    if spec.op == "align":
        own = (2, 1, 1, FEW_ROWS, first[4])
        graphic = ((FEW_ROWS,), rest[6]) if len(rest) > 5 else ()
        return Spec(spec.op, proof.alignment(own, second[1], rest[1], *graphic))
    if spec.op == "branch_linear" and len(rest) == 3:
        bias, (groups, _, width), keep = rest
        flat = (first[0], groups * FEW_ROWS, first[2])
        return Spec(spec.op, (flat, second, bias, (groups, FEW_ROWS, width), keep))
    if spec.op == "branch_linear":
        return Spec(spec.op, ((first[0], FEW_ROWS, first[2]), second, *rest))
    if spec.op in ("linear", "geglu"):
        few = rows(first, len(first) - 2)
        others = [rows(x, len(x) - 2) if x is not None and len(x) > 1 else x for x in rest]
        return Spec(spec.op, (few, second, *others))
    return spec


@dataclass(frozen=True)
class Work:
    """What a call cannot do without.

    flops: of matrix products. moved: bytes, every input read once and the result written once.
    exps: exponentials, with sigmoids and error functions as one each.
    """

    flops: int
    moved: int
    exps: int


def work(spec: Spec, dtype: torch.dtype) -> Work:
    """Counted on shapes alone."""
    arguments = [
        torch.empty(x, dtype=dtype, device=META) if isinstance(x, tuple) else x
        for x in spec.arguments
    ]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        out = getattr(reference, spec.op)(*arguments)
    tensors = [x for x in (*arguments, out) if isinstance(x, Tensor)]
    exps = 0
    if spec.op in ("attention", "align"):
        query, key, _, heads, *more = spec.arguments
        keys = key[1] + sum(x[1] for x in more[:1] if spec.op == "attention")
        exps = math.prod(query[:-1]) * heads * keys
    elif spec.op == "exchange":
        exps = 2 * spec.arguments[0][1]
    elif spec.op in ("geglu", "group_norm_silu"):
        exps = out.numel()
    return Work(int(counter.get_total_flops()), sum(x.nbytes for x in tensors), exps)
