"""Does a backend compute an op here? It is run, on this device, and compared with fp64.

A backend can say that it serves an op and still fail: the processor lacks an instruction, a library
was built for another PyTorch, a kernel is wrong at one width. So each one solves small problems
before an engine uses it, and what it may lose is derived: what plain PyTorch loses in the same
dtype, plus a rounding. Verdicts are kept for the process.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualdiff_engine.ops import reference


def alignment(query: tuple[int, ...], tokens: int, heads: int, *graphic: Any) -> tuple[Any, ...]:
    """Arguments of `align` as shapes. tokens: of the prompt. graphic: shape, strength."""
    rows, channels = 2 * query[1], query[-1]
    source = (rows, tokens, channels)
    return (query, source, source, heads, (rows, channels), (tokens,), (1,), *graphic)


# Shapes of the arguments, in the order of `reference`; what is not a tensor as it is. Widths and
# head widths of SD-1.5, of small models, and sizes that no vector or block divides; one row; the
# background's keys and values; a second source of keys; strided views (see `_views`).
PROBLEMS: dict[str, tuple[tuple[Any, ...], ...]] = {
    "linear": (
        ((3, 63, 48), (40, 48), (40,), (3, 63, 40)),
        ((1, 1, 320), (17, 320), (17,)),
        ((2, 64, 64), (64, 64), None),
        ((2, 5, 35), (33, 35), (33,), (2, 5, 33)),
    ),
    "branch_linear": (
        ((2, 63, 48), (2, 40, 48)),
        ((1, 65, 320), (1, 64, 320), (64,)),
        ((2, 1, 35), (2, 33, 35), (33,)),
        ((2, 126, 32), (2, 96, 32), None, (2, 21, 64), (1,)),
    ),
    "attention": (
        ((3, 63, 80), (3, 63, 80), (3, 63, 80), 2),
        ((2, 65, 64), (2, 77, 64), (2, 77, 64), 2),
        ((1, 17, 160), (1, 130, 160), (1, 130, 160), 2),
        ((1, 128, 160), (1, 128, 160), (1, 128, 160), 1),
        ((1, 1, 14), (1, 1, 14), (1, 1, 14), 2),
        ((2, 9, 80), (2, 9, 80), (2, 9, 80), 2, (2, 13, 80), (2, 13, 80)),
        ((4, 9, 80), (2, 9, 80), (2, 9, 80), 2, (2, 9, 80), (2, 9, 80)),
        ((6, 17, 64), (3, 130, 64), (3, 130, 64), 2),
    ),
    "exchange": tuple(
        ((2, m, c), (c, c), (c,), (c, c), (c,), (2, m, c))
        for m, c in ((63, 48), (1, 16), (70, 40), (17, 160))
    ),
    "merge": tuple(
        ((2, m, c), (2, c, c), (2, m, c)) for m, c in ((63, 48), (1, 16), (70, 40), (17, 160))
    ),
    "align": (
        alignment((2, 2, 3, 21, 80), 77, 2),
        alignment((2, 1, 2, 65, 64), 9, 4, (2, 65), 3.0),
        alignment((2, 2, 1, 17, 160), 130, 1, (17,), 1.5),
        alignment((2, 1, 1, 1, 14), 1, 2),
    ),
    "group_norm_silu": (
        ((3, 48, 5, 7), 8, (48,), (48,), 1e-5),
        ((2, 64, 8, 8), 32, (64,), (64,), 1e-5),
        ((2, 320, 9, 8), 32, (320,), (320,), 1e-5),
        ((1, 48, 1, 1), 8, (48,), (48,), 1e-6),
    ),
    "convolution": (
        ((2, 48, 5, 7), (24, 48, 3, 3), (24,), 1, 1),
        ((1, 4, 9, 8), (16, 4, 3, 3), (16,), 2, 1),
        ((2, 35, 4, 4), (33, 35, 1, 1), None, 1, 0),
    ),
    "geglu": (
        ((3, 63, 48), (96, 48), (96,)),
        ((1, 1, 320), (64, 320), (64,)),
        ((2, 64, 64), (128, 64), (128,)),
        ((2, 5, 35), (66, 35), (66,)),
    ),
    "guided_step": (((2, 2, 3, 4, 5, 7), 2.5), ((2, 2, 1, 4, 8, 8), 7.5)),
}
# a first call may compile a kernel
LIMIT_S = {"cpu": 10.0, "cuda": 60.0}
# Sums in another order are another draw of the same error, and a fused kernel may round an
# intermediate twice where plain PyTorch rounds once; in a few small rows that doubles the worst.
ROOM = 2.0
# no op rounds to its dtype more often than this between its inputs and its result
ROUNDINGS = 8


class Verdict(NamedTuple):
    """ok: whether it may be used. reason: why not, naming the problem; empty where it may."""

    ok: bool
    reason: str


class Loss(NamedTuple):
    """What a result is off, relative to its norm.

    whole: L2, of all of it. row: L2, of its worst row. gain: of its worst row, along that row: a
    rounding points anywhere and cancels, a factor does not.
    """

    whole: float
    row: float
    gain: float


def loss(actual: Tensor, exact: Tensor) -> Loss:
    """Of a result against fp64. A row is the last axis, of maps [N, C, h, w] the channels."""
    off = actual.double() - exact
    rows, off_rows = ((x.movedim(1, -1) if x.dim() == 4 else x) for x in (exact, off))
    norm = rows.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    row = off_rows.norm(dim=-1) / norm
    gain = (off_rows * rows).sum(-1).abs() / norm.square()
    return Loss(float(off.norm() / exact.norm()), float(row.max()), float(gain.max()))


def in_turn(terms: int) -> float:
    """What an fp32 sum of independent terms loses, added one after the other.

    Partial sums of K terms grow as the root of their number, and each is rounded, with a variance
    of a third of half a unit squared: together u sqrt(K / 6) of the result.
    """
    return torch.finfo(torch.float32).eps / 2 * math.sqrt(terms / 6)


def budget(eager: Tensor, exact: Tensor, terms: int, room: float = 1.0) -> Loss:
    """What a result may lose: as plain PyTorch in that dtype, or a sum in turn; and a rounding.

    eager: the op in plain PyTorch, in the candidate's dtype. exact: in fp64. terms: of the longest
    sum. room: see ROOM. A sum in turn is off by one deviation on the whole; the worst of N rows by
    sqrt(2 ln N) of them.
    """
    # storing the result alone costs up to half a unit in the last place
    band = torch.finfo(eager.dtype).eps / 2
    rows = exact.numel() // exact.shape[1 if exact.dim() == 4 else -1]
    worst = max(1.0, math.sqrt(2 * math.log(rows)))
    lost, summed = loss(eager, exact), in_turn(terms)
    return Loss(
        whole=room * max(lost.whole, summed) + band,
        row=room * max(lost.row, summed * worst) + band,
        gain=room * max(lost.gain, summed * worst) + band,
    )


def terms(op: str, arguments: Sequence[Any]) -> int:
    """Of the longest sum in a matrix product of the op, 0 where there is none."""
    if op in ("group_norm_silu", "guided_step"):
        return 0
    if op == "convolution":
        return int(arguments[1][0].numel())
    keys = arguments[1].shape[1] if op in ("attention", "align") else 0
    return int(max(arguments[0].shape[-1], keys))


def draw(
    op: str, shapes: Sequence[Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> list[Any]:
    """Arguments of these shapes; activations and results are of order one."""
    generator = torch.Generator().manual_seed(seed)
    names = inspect.signature(getattr(reference, op)).parameters

    def values(shape: tuple[int, ...], name: str) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        if "weight" in name:
            terms = math.prod(shape[1:]) if len(shape) == 4 else shape[-1]
            drawn = 1 + 0.1 * drawn if len(shape) == 1 else drawn / math.sqrt(terms)
        if name == "gate_weight":
            # a score is a product of two normalised rows through it
            drawn = drawn / math.sqrt(shape[-1])
        if name in ("tokens", "graphic"):
            # about half of them
            drawn = (drawn > 0).float() if name == "tokens" else torch.sigmoid(drawn)
        return (0.3 * drawn if "bias" in name or name == "keep" else drawn).to(device, dtype)

    return _views(
        op,
        [
            values(shape, name) if isinstance(shape, tuple) else shape
            for shape, name in zip(shapes, names, strict=False)
        ],
    )


def _views(op: str, arguments: list[Any]) -> list[Any]:
    """In the network's layout: maps channels-last, queries, keys and values of one projection."""
    if op in ("group_norm_silu", "convolution"):
        arguments[0] = arguments[0].contiguous(memory_format=torch.channels_last)
    elif op in ("attention", "align"):
        query, key, value = arguments[:3]
        if query.shape == key.shape:
            arguments[:3] = torch.cat([query, key, value], dim=-1).chunk(3, dim=-1)
        else:
            arguments[1:3] = torch.cat([key, value], dim=-1).chunk(2, dim=-1)
    return arguments


def label(shapes: Sequence[Any]) -> str:
    """Of every tensor the shape, as in "2x63x48 2x40x48 8"."""
    given = [x for x in shapes if x is not None]
    return " ".join("x".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in given)


@functools.lru_cache(maxsize=256)
def _answer(
    op: str, shapes: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Loss]:
    """The result of a drawn problem in fp64, and what a candidate may lose.

    Raises ArithmeticError where PyTorch itself loses more than its roundings explain: then it is no
    measure for others.
    """
    arguments = draw(op, shapes, device, dtype)
    with _one_thread():
        exact = _exactly(op, [x.double() if isinstance(x, Tensor) else x for x in arguments])
        eager = getattr(reference, op)(*arguments)
    length = terms(op, arguments)
    lost = loss(eager, exact).whole
    if not lost <= ROUNDINGS * torch.finfo(eager.dtype).eps + ROOM * in_turn(length):
        raise ArithmeticError(f"plain PyTorch is wrong by {lost:.1e} here")
    return exact, budget(eager, exact, length, ROOM)


def _exactly(op: str, arguments: Sequence[Any]) -> Tensor:
    """The reference on fp64 arguments."""
    if op != "guided_step":
        out: Tensor = getattr(reference, op)(*arguments)
        return out
    # the reference of this one goes through fp32
    uncond, cond = arguments[0].unbind(1)
    return torch.lerp(uncond, cond, arguments[1])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small problems gain nothing from threads, and wait for them where processors are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fault(
    run: Callable[..., Tensor],
    op: str,
    shapes: tuple[Any, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """What is wrong with a candidate's result, in words; empty where it is right.

    Raises whatever the candidate raises.
    """
    exact, allowed = _answer(op, shapes, device, dtype)
    out = run(*draw(op, shapes, device, dtype))
    kept = torch.float32 if op == "guided_step" else dtype
    if (out.shape, out.dtype) != (exact.shape, kept):
        return f"returns {out.dtype} {list(out.shape)} for {kept} {list(exact.shape)}"
    if not out.isfinite().all():
        return "returns NaN or infinity"
    places = ("", " in one row", " along one row")
    for where, lost, limit in zip(places, loss(out, exact), allowed, strict=True):
        if not lost <= limit:
            return f"is wrong by {lost:.1e}{where} ({limit:.1e} allowed)"
    return ""


def within(limit_s: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises; TimeoutError past a limit, its thread is left behind."""
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            done.put((function(), None))
        # whatever a library raises is the caller's to name
        except BaseException as raised:
            done.put((None, raised))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, raised = done.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError from None
    if raised is not None:
        raise raised
    return result


_verdicts: dict[tuple[object, ...], Verdict] = {}


def prove(
    run: Callable[..., Tensor],
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    problems: Sequence[Sequence[Any]] | None = None,
    limit_s: float = 0.0,
) -> Verdict:
    """Whether `run` computes an op on this device in this dtype; remembered for the process.

    problems: shapes of the arguments, as in PROBLEMS, which are the default. limit_s: for all of
    them, where it is more than the device's LIMIT_S.
    """
    problems = PROBLEMS[op] if problems is None else problems
    key = (run, op, str(device), dtype, tuple(map(tuple, problems)))
    if key not in _verdicts:
        _verdicts[key] = _prove(run, op, device, dtype, problems, limit_s)
    return _verdicts[key]


def _prove(
    run: Callable[..., Tensor],
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    problems: Sequence[Sequence[Any]],
    limit_s: float,
) -> Verdict:
    at = ""

    def solve() -> str:
        nonlocal at
        for shapes in problems:
            at = label(shapes)
            with torch.inference_mode():
                if wrong := fault(run, op, tuple(shapes), device, dtype):
                    return wrong
        return ""

    limit_s = max(limit_s, LIMIT_S[device.type])
    try:
        wrong = within(limit_s, solve)
    except TimeoutError:
        wrong = f"does not answer within {limit_s:g} s"
    except Exception as raised:
        wrong = f"fails: {first_line(raised)}"
    return Verdict(not wrong, f"{wrong} (tried on {at})" if wrong else "")


def first_line(raised: BaseException) -> str:
    """An exception in one line: its first sentence."""
    text = f"{type(raised).__name__}: {raised}".strip()
    return text.splitlines()[0].partition(". ")[0].rstrip(".")
