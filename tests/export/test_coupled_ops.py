"""Ops of other couplings as graphs: plain ONNX nodes, at every batch, right in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualdiff_engine.export.graph.modules import Graph, graph_ops
from op_inputs import draw
from support import relative

pytest.importorskip("onnxscript")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from dualdiff_engine.export.graph.trace import trace  # noqa: E402

HEADS, ROWS, LENGTH, CHANNELS, SIDE = 2, 2, 7, 16, 6
OPS = graph_ops()


def connect(self: object, qkv: Tensor) -> Tensor:
    """qkv [2·M, S, 3·C] of both branches."""
    q, k, v = qkv.chunk(3, -1)
    half = qkv.shape[0] // 2
    return OPS.attention(q, k[:half], v[:half], HEADS, k[half:], v[half:])


def align(
    self: object, query: Tensor, kv: Tensor, mean_key: Tensor, tokens: Tensor, scale: Tensor
) -> Tensor:
    key, value = kv.chunk(2, dim=-1)
    return OPS.align(query, key, value, HEADS, mean_key, tokens, scale)


def drawn(
    self: object,
    query: Tensor,
    kv: Tensor,
    mean_key: Tensor,
    tokens: Tensor,
    scale: Tensor,
    graphic: Tensor,
) -> Tensor:
    key, value = kv.chunk(2, dim=-1)
    return OPS.align(query, key, value, HEADS, mean_key, tokens, scale, graphic, 2.5)


def merge(self: object, input: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return OPS.merge(input, weight, residual)


def inputs(pairs: int) -> dict[str, dict[str, Tensor]]:
    tokens = torch.zeros(LENGTH)
    tokens[2:4] = 1
    kv = draw(2 * ROWS, LENGTH, 2 * CHANNELS, seed=1)
    aligned = {
        "query": draw(2, ROWS, pairs, SIDE * SIDE, CHANNELS),
        "kv": kv,
        "mean_key": kv[:, 2:4, :CHANNELS].mean(1),
        "tokens": tokens,
        "scale": torch.tensor([0.7]),
    }
    return {
        "connect": {"qkv": draw(2 * ROWS * pairs, SIDE * SIDE, 3 * CHANNELS)},
        "align": aligned,
        "drawn": aligned | {"graphic": draw(pairs, SIDE * SIDE, seed=2).sigmoid()},
        "merge": {
            "input": draw(2, ROWS * pairs * SIDE, CHANNELS),
            "weight": draw(2, CHANNELS, CHANNELS, seed=1) / CHANNELS**0.5,
            "residual": draw(2, ROWS * pairs * SIDE, CHANNELS, seed=2),
        },
    }


# what varies with the batch, by input
AXES: dict[str, dict[str, dict[int, str]]] = {
    "connect": {"qkv": {0: "rows"}},
    "align": {"query": {2: "pairs"}},
    "drawn": {"query": {2: "pairs"}, "graphic": {0: "pairs"}},
    "merge": {"input": {1: "positions"}, "residual": {1: "positions"}},
}
FUNCTIONS = {"connect": connect, "align": align, "drawn": drawn, "merge": merge}


# the oldest opset takes attention apart, the latest keeps it
@pytest.mark.parametrize(
    ("name", "opset"), [("connect", 23), ("drawn", 23), ("align", 18), ("merge", 18)]
)
def test_a_graph_of_plain_nodes_computes_the_op(name: str, opset: int) -> None:
    module = type(name, (nn.Module,), {"forward": FUNCTIONS[name]})()
    with torch.inference_mode(False):
        graph = Graph(name, module, inputs(2)[name], AXES[name], ("out",))
        model = trace(graph, opset).model
    kinds = Counter(node.op_type for node in model.graph)
    assert {node.domain for node in model.graph} <= {""}
    assert not kinds["Loop"] + kinds["If"] + kinds["ScatterND"]
    if opset == 23 and name != "merge":
        assert kinds["Attention"] == 1, kinds
    session = onnxruntime.InferenceSession(
        ir.serde.serialize_model(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for pairs in (2, 1, 3):
        given = inputs(pairs)[name]
        feed: dict[str, Any] = {key: x.numpy() for key, x in given.items()}
        (out,) = session.run(None, feed)
        expected = module(*given.values())
        assert relative(torch.from_numpy(out), expected) <= 5e-6
