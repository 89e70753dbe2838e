"""The C++ kernels: every level of instructions, layouts, threads, wrong arguments, and the build.

Exactness on odd shapes, strided and poisoned, is in test_ops.py with the other backends.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualdiff_engine.errors import BackendError
from dualdiff_engine.ops import bind, native, serves
from op_inputs import draw
from tolerance import assert_within_budget

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BUILT, WHY = native.supported("attention", CPU, torch.float32)
needs_extension = pytest.mark.skipif(not BUILT, reason=WHY)
LEVELS = native._native.levels() if BUILT else []


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native._native.use_level(request.param)
    yield request.param
    native._native.use_level(LEVELS[0])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def unfused_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Every product rounded before it is added, as on a processor without fused instructions."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = torch.zeros(*q.shape[:-1], k.shape[-2])
    for channel in range(q.shape[-1]):
        scores += q[..., channel, None] * k[..., channel][..., None, :]
    weights = torch.softmax(scores * q.shape[-1] ** -0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


# widths of SD-1.5, odd ones, lengths around a chunk of queries and a block of keys
@pytest.mark.parametrize(
    ("queries", "keys", "more", "width"),
    [(513, 130, 0, 40), (63, 77, 5, 80), (64, 128, 129, 160), (1, 1, 0, 7), (17, 257, 1, 3)],
)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention(
    level: str, dtype: torch.dtype, queries: int, keys: int, more: int, width: int, scale: float
) -> None:
    heads, rows = 2, 3
    q = scale * draw(rows, queries, heads * width, dtype=dtype)
    packed = draw(rows, keys, 2 * heads * width, dtype=dtype, seed=1)
    second = draw(rows, more, 2 * heads * width, dtype=dtype, seed=2)
    k, v, k2, v2 = (*packed.chunk(2, -1), *second.chunk(2, -1))
    whole = torch.cat([packed, second], dim=1).chunk(2, -1)
    exact = plain_attention(q.double(), *(x.double() for x in whole), heads)
    unfused = level == "portable" and dtype == torch.float32
    eager = (unfused_attention if unfused else plain_attention)(q, *whole, heads)
    source = (k2, v2) if more else ()
    assert_within_budget(
        f"attention {level}", native.attention(q, k, v, heads, *source), eager, exact
    )


def alignment_arguments(dtype: torch.dtype, pairs: int = 3) -> tuple[Any, ...]:
    query = draw(2, 2, pairs, 63, 96, dtype=dtype)
    key, value = draw(4, 77, 192, dtype=dtype, seed=1).chunk(2, -1)
    tokens = torch.zeros(77, dtype=dtype)
    tokens[4:7] = 1
    graphic = draw(pairs, 63, dtype=dtype, seed=2).sigmoid()
    scale = torch.tensor([0.7]).to(dtype)
    return query, key, value, 2, key[:, 4:7].mean(1), tokens, scale, graphic, 2.5


def cases(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    def matrix(*shape: int, seed: int = 3) -> Tensor:
        return draw(*shape, dtype=dtype, seed=seed) / shape[-1] ** 0.5

    maps = draw(3, 48, 5, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    line = draw(48, dtype=dtype, seed=4)
    x = draw(2, 63, 48, dtype=dtype)
    return {
        "attention": (*[draw(3, 63, 96, dtype=dtype, seed=s) for s in range(3)], 2),
        "exchange": (x, matrix(48, 48), line, matrix(48, 48, seed=5), line, draw(2, 63, 48).to(x)),
        "merge": (x, torch.stack([matrix(48, 48), matrix(48, 48, seed=5)]), draw(2, 63, 48).to(x)),
        "align": alignment_arguments(dtype),
        "group_norm_silu": (maps, 8, line, line, 1e-5),
    }


@needs_extension
@pytest.mark.parametrize("op", native.OPS)
def test_levels_agree_with_fp64(op: str, level: str, dtype: torch.dtype) -> None:
    arguments = cases(dtype)[op]
    plain = getattr(bind("reference"), op)
    exact = plain(*(x.double() if isinstance(x, Tensor) else x for x in arguments))
    actual = getattr(bind("native", dtype=dtype), op)(*arguments)
    assert_within_budget(f"{op} {level}", actual, plain(*arguments), exact)


@needs_extension
@pytest.mark.parametrize("op", native.OPS)
def test_operators_are_registered_as_they_behave(op: str, dtype: torch.dtype) -> None:
    # the products of an exchange may lack their instructions
    ok, reason = serves("native", op, CPU, dtype)
    if not ok:
        pytest.skip(reason)
    torch.library.opcheck(getattr(native, op), cases(dtype)[op])


@needs_extension
@pytest.mark.parametrize("op", native.OPS)
def test_torch_compile_passes_through(op: str) -> None:
    arguments = cases(torch.float32)[op]
    function = getattr(native, op)
    compiled = torch.compile(lambda *x: function(*x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), function(*arguments))


@needs_extension
def test_a_row_does_not_depend_on_its_batch_or_on_threads(dtype: torch.dtype) -> None:
    q, k, v = (draw(5, 600, 80, dtype=dtype, seed=s) for s in range(3))
    maps = draw(5, 48, 9, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    line, threads = draw(48, dtype=dtype), torch.get_num_threads()
    whole = native.attention(q, k, v, 2), native.group_norm_silu(maps, 8, line, line, 1e-5)
    query, *rest, graphic, strength = alignment_arguments(dtype)
    aligned = native.align(query, *rest, graphic, strength)
    try:
        torch.set_num_threads(1)
        alone = native.attention(q[3:4], k[3:4], v[3:4], 2)
        one_map = native.group_norm_silu(maps[3:4], 8, line, line, 1e-5)
        one_pair = native.align(query[:, :, 2:], *rest, graphic[2:], strength)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole[0][3:4], alone)
    assert torch.equal(whole[1][3:4], one_map)
    assert torch.equal(aligned[:, :, 2:], one_pair)


@needs_extension
@pytest.mark.parametrize("op", native.OPS)
def test_empty_inputs(op: str) -> None:
    arguments = list(cases(torch.float32)[op])
    if op in ("exchange", "merge"):
        arguments[0], arguments[-1] = arguments[0][:, :0], arguments[-1][:, :0]
    elif op == "align":
        arguments[0], arguments[7] = arguments[0][:, :, :0], arguments[7][:0]
    else:
        first = 3 if op == "attention" else 1
        arguments[:first] = [x[:0] for x in arguments[:first]]
    assert getattr(native, op)(*arguments).numel() == 0


@needs_extension
def test_not_finite_values_show() -> None:
    q, k, v = (draw(1, 20, 16, seed=s) for s in range(3))
    q[0, 3, 2] = float("nan")
    out = native.attention(q, k, v, 2)
    assert out[0, 3, :8].isnan().all()
    assert out[0, :3].isfinite().all()


@needs_extension
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: native.attention(x, x, x.double(), 2), "of one dtype; got torch"),
        (lambda x: native.attention(*[x.half()] * 3, 2), "fp32 or bf16 on the CPU"),
        (lambda x: native.attention(x, x, x, 5), "C of 5 heads"),
        (lambda x: native.attention(x, x, x[..., :8], 2), "keys and values"),
        (lambda x: native.attention(x, x[:, :0], x[:, :0], 2), "at least one key"),
        (lambda x: native.attention(x, x, x, 2, x), "both more_key and more_value"),
        (lambda x: native.exchange(x, x[0], x[0, 0], x[0], x[0, 0], x), "weights \\[C, C\\]"),
        (lambda x: native.merge(x, x[:1], x), "weight \\[2, C, C\\]"),
        (lambda x: native.align(*[x] * 3, 2, *[x] * 3), "query \\[2, R, B, S, C\\]"),
        (lambda x: native.group_norm_silu(x, 2, x[0, 0], x[0, 0], 1e-5), "\\[N, C, h, w\\]"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(draw(2, 5, 16))


def test_without_the_extension_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_missing", "not built: …")
    with pytest.raises(BackendError, match=r"'native' cannot be used: .*not built"):
        bind("native")
    table = {row.op: row for row in bind("auto").table}
    assert table["attention"].backend == "reference"
    assert "not native: not built" in table["attention"].reason


@pytest.mark.parametrize(
    ("asked", "message"),
    [("cuda", "has no CUDA sources"), ("cpu,gpu", "takes cpu, got gpu")],
)
def test_the_build_refuses_what_it_cannot_do(asked: str, message: str) -> None:
    run = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env={**os.environ, "DUALDIFF_BUILD_NATIVE": asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert message in run.stderr


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("portable", "C++ kernels for portable"),
        ("off", "switched off by DUALDIFF_NATIVE_ISA"),
        ("mmx", "this processor has no level mmx; it has "),
    ],
)
def test_instructions_can_be_limited(asked: str, shown: str) -> None:
    code = (
        "import torch; from dualdiff_engine.ops import native\n"
        "print(native.supported('attention', torch.device('cpu'), torch.float32))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DUALDIFF_NATIVE_ISA": asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown in run.stdout
