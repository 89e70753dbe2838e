"""Is every kernel right on this device: against fp64, as an operator, in a CUDA graph.

And is the network made of them: against fp64, and replayed from graphs bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine import ops
from dualdiff_engine.adapters import fold
from dualdiff_engine.bench.op.bench import check, reason, relative
from dualdiff_engine.bench.op.calls import Spec, coupled, trace
from dualdiff_engine.bench.op.cases import Problem, problem
from dualdiff_engine.bench.step.case import Case, RandomWeights, random_adapter
from dualdiff_engine.bench.step.peers import variant
from dualdiff_engine.model.cuda_graph import CudaCapture, GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import proof

Row = dict[str, Any]
BACKEND = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# sizes that no block divides, one row, a background, and two heads of each of SD-1.5's widths
ODD = (
    Spec("linear", ((3, 63, 48), (40, 48), (40,))),
    Spec("linear", ((1, 1, 48), (40, 48), (40,), (1, 1, 40))),
    Spec("branch_linear", ((2, 189, 48), (2, 40, 48))),
    Spec("branch_linear", ((1, 63, 48), (1, 40, 48), (40,))),
    Spec("branch_linear", ((2, 378, 48), (2, 144, 48), None, (2, 63, 96), (1,))),
    *(Spec("attention", (*[(3, 63, 2 * dim)] * 3, 2)) for dim in (40, 80, 160)),
    Spec("attention", ((2, 126, 80), (2, 77, 80), (2, 77, 80), 2)),
    Spec("attention", ((4, 63, 160), *[(2, 63, 160)] * 2, 2, *[(2, 63, 160)] * 2)),
    Spec("exchange", ((2, 63, 48), (48, 48), (48,), (48, 48), (48,), (2, 63, 48))),
    Spec("merge", ((2, 63, 48), (2, 48, 48), (2, 63, 48))),
    Spec("align", proof.alignment((2, 2, 3, 63, 80), 77, 2)),
    Spec("align", proof.alignment((2, 1, 2, 63, 160), 77, 1, (2, 63), 2.5)),
    Spec("group_norm_silu", ((3, 48, 5, 7), 8, (48,), (48,), 1e-5)),
    Spec("geglu", ((3, 63, 48), (96, 48), (96,))),
    Spec("guided_step", ((2, 2, 3, 4, 5, 7), 2.5)),
)
# the network may lose this much more to fp64 than plain PyTorch does in the same dtype: a sum in
# another order is no worse, and no better, through some sixty layers
ROOM = 2.0


def accuracy(
    model: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[Row]:
    """Odd shapes and those of the network at one pair, in every dtype; those of its other forms."""
    plain = trace(model, 1)
    traced = plain | trace(model, 1, background=True) | coupled(plain, 1)
    for dtype in dtypes:
        for spec in (*ODD, *traced):
            yield _row(spec.op, "fp64", dtype, spec.label, **_against_fp64(spec, device, dtype))


def _row(op: str, kind: str, dtype: torch.dtype, shapes: str = "", **facts: Any) -> Row:
    name = str(dtype).removeprefix("torch.")
    return {"op": op, "check": kind, "dtype": name, "shapes": shapes, **facts}


def _against_fp64(spec: Spec, device: torch.device, dtype: torch.dtype) -> Row:
    case = problem(spec, device, dtype)
    run = partial(ops.backend_op(BACKEND, spec.op), *case.arguments)
    return check(case, {BACKEND: run})[BACKEND]


def operators(device: torch.device, *, interpreted: bool) -> Iterator[Row]:
    """Registration, torch.compile in one graph, and capture, once per op."""
    seen: set[str] = set()
    for spec in ODD:
        if spec.op in seen:
            continue
        seen.add(spec.op)
        case = problem(spec, device, torch.float32)
        kinds: dict[str, Callable[[Problem], None]] = {
            "opcheck": _opcheck,
            "fullgraph": partial(_fullgraph, backend="eager" if interpreted else "inductor"),
            "capture": _capture,
        }
        for kind, function in kinds.items():
            if kind == "capture" and device.type != "cuda":
                status = "not here: needs an NVIDIA GPU"
            else:
                status = _status(partial(function, case))
            yield _row(spec.op, kind, torch.float32, spec.label, status=status)


def _status(function: Callable[[], object]) -> str:
    try:
        function()
    # whatever goes wrong is what the row says
    except Exception as error:
        return f"red: {reason(error)}"
    return "ok"


def _same(actual: Tensor, expected: Tensor) -> None:
    if not torch.equal(actual, expected):
        raise AssertionError(f"differs by {relative(actual, expected.double()):.1e}")


def _opcheck(case: Problem) -> None:
    op: Any = ops.backend_op(BACKEND, case.spec.op)
    torch.library.opcheck(op, case.arguments)


def _fullgraph(case: Problem, backend: str) -> None:
    op = ops.backend_op(BACKEND, case.spec.op)
    torch._dynamo.reset()
    function = torch.compile(lambda *x: op(*x), fullgraph=True, backend=backend)
    _same(function(*case.arguments), op(*case.arguments))


def _capture(case: Problem) -> None:
    """A replay computes with what is in the inputs by then."""
    op, first = ops.backend_op(BACKEND, case.spec.op), case.arguments[0]
    replay = CudaCapture(first.device)(lambda: [op(*case.arguments)])
    first.copy_(first.flip(0))
    _same(replay()[0], op(*case.arguments))


def network(
    model: str, device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[Row]:
    """A denoiser call with the kernels, and with plain PyTorch, against plain PyTorch in fp64."""
    exact = _noise(model, "reference", device, torch.float64)
    for dtype in dtypes:
        lost = {}
        for backend in (BACKEND, "reference"):
            lost[backend] = relative(_noise(model, backend, device, dtype), exact)
        budget = ROOM * lost["reference"]
        status = "ok" if lost[BACKEND] <= budget else "red: inexact"
        yield _row("network", "fp64", dtype, error=lost[BACKEND], budget=budget, status=status)


def _case(model: str) -> Case:
    return Case(model, 1, 50, 8, 8, 2.5, True, 0)


def _noise(model: str, backend: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return variant(backend=backend)(_case(model), device, dtype).step(25)


def graphs(model: str, device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Replays against the network itself, before and after a switch of adapters."""
    if device.type != "cuda":
        yield _row("network", "graphs", dtype, status="not here: needs an NVIDIA GPU")
        return
    for background in (False, True):
        status = _status(partial(_replayed, model, device, dtype, background))
        label = "with background" if background else "plain"
        yield _row("network", "graphs", dtype, label, status=status)


def _replayed(model: str, device: torch.device, dtype: torch.dtype, background: bool) -> None:
    peer = variant(backend=BACKEND)(_case(model), device, dtype)
    assert isinstance(peer.unet, DualUNet)
    graphed, inputs = GraphedDenoiser(peer.unet), peer.inputs["latents"].transpose(0, 1)[:, None]
    base = RandomWeights.of(model, 0)
    for seed in (0, 1, 0):
        adapter = random_adapter(RandomWeights(base.shapes, seed), background=True)
        graphed.load(fold.fold_sites(base, adapter.sites, device, dtype))
        for index in (10, 40):
            bias = peer.time_bias[index]
            shares = peer.background(index) if background else None
            _same(
                graphed(inputs + seed, bias, peer.text, shares),
                peer.unet(inputs + seed, bias, peer.text, shares),
            )
