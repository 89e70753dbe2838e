"""The exchange between the branches as one operator of our own, with a body of standard ones.

`com.dualdiff.Exchange` computes `dualdiff_engine.ops.reference.exchange`. A runtime that knows it
takes the node as it is: TensorRT, where the plugin that the node names is registered (see
`export.exchange_plugin`). Every other one inlines the body. Off by default: the body is what the
graph holds otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import AttributeProto
from torch import Tensor

from dualdiff_engine.export.folder import weight_files
from dualdiff_engine.ops.reference import INTERACTION_EPS

DOMAIN, NAME, VERSION = "com.dualdiff", "Exchange", 1
# where TensorRT's parser looks for a plugin before it takes the body
PLUGIN = {"plugin_namespace": "dualdiff", "plugin_version": "1"}


def as_operator(
    input: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    residual: Tensor,
    eps: float = INTERACTION_EPS,
) -> Tensor:
    """What `reference.exchange` is in a graph that keeps it one operator."""
    output: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        (input, gate_weight, gate_bias, value_weight, value_bias, residual),
        {"epsilon": eps, **PLUGIN},
        dtype=input.dtype,
        shape=input.shape,
        version=VERSION,
    )
    # the exporter puts what it does not know on the CPU; graphs are traced on the meta device
    return output.to(input.device)


def with_body(model: onnx.ModelProto) -> onnx.ModelProto:
    """Give a model that uses the operator its body; any other is returned as it came."""
    if not any(node.domain == DOMAIN for node in model.graph.node):
        return model
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    model.functions.append(_body(opset))
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    return model


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    """The operator's nodes in a graph's file, which is checked. Raises BackendError."""
    return [node for node in weight_files.load_graph(path).graph.node if node.domain == DOMAIN]


def is_kept(path: Path) -> bool:
    """Whether a graph was exported with the operator. Raises BackendError."""
    return bool(nodes_of(path))


def _node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(kind, inputs.split(), [output], **attributes)


def _body(opset: int) -> onnx.FunctionProto:
    """As `reference.exchange`: statistics, score and gate in fp32."""
    one = onnx.helper.make_tensor("one", onnx.TensorProto.FLOAT, [1], [1.0])
    numbers = {
        "first": (onnx.TensorProto.INT64, [], [0]),
        "second": (onnx.TensorProto.INT64, [], [1]),
        "last": (onnx.TensorProto.INT64, [1], [-1]),
    }
    norm = _node("LayerNormalization", "input scale", "normed", axis=-1)
    epsilon = AttributeProto(name="epsilon", ref_attr_name="epsilon", type=AttributeProto.FLOAT)
    norm.attribute.append(epsilon)
    wide = onnx.TensorProto.FLOAT
    nodes = [
        *(
            _node("Constant", "", name, value=onnx.helper.make_tensor(name, *about))
            for name, about in numbers.items()
        ),
        _node("Shape", "gate_bias", "width"),
        _node("ConstantOfShape", "width", "ones", value=one),
        _node("CastLike", "ones input", "scale"),
        norm,
        _node("Gather", "normed first", "normed_0", axis=0),
        _node("Gather", "normed second", "normed_1", axis=0),
        _node("Sub", "normed_0 normed_1", "difference"),
        _node("Transpose", "gate_weight", "gate_turned", perm=[1, 0]),
        _node("MatMul", "difference gate_turned", "projected"),
        _node("Cast", "normed", "normed_wide", to=wide),
        _node("Cast", "projected", "projected_wide", to=wide),
        _node("Cast", "difference", "difference_wide", to=wide),
        _node("Mul", "normed_wide projected_wide", "products"),
        _node("ReduceSum", "products last", "sums", keepdims=0),
        _node("MatMul", "difference_wide gate_bias", "shared"),
        _node("Add", "sums shared", "scores"),
        _node("Sigmoid", "scores", "gate_flat"),
        _node("Unsqueeze", "gate_flat last", "gate_wide"),
        _node("CastLike", "gate_wide input", "gate"),
        _node("Mul", "gate difference", "moved"),
        _node("Add", "normed_1 moved", "mixed"),
        _node("Transpose", "value_weight", "value_turned", perm=[1, 0]),
        _node("MatMul", "mixed value_turned", "valued"),
        _node("Add", "valued value_bias", "biased"),
        _node("Add", "biased residual", "joined"),
        _node("Add", "joined input", "output"),
    ]
    inputs = ["input", "gate_weight", "gate_bias", "value_weight", "value_bias", "residual"]
    return onnx.helper.make_function(
        DOMAIN, NAME, inputs, ["output"], nodes,
        [onnx.helper.make_opsetid("", opset)], ["epsilon", *PLUGIN],
    )  # fmt: skip
