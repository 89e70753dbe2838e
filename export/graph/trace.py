"""A module -> an ONNX graph whose weights are named initializers without values.

torch.onnx translates; what is done here keeps the weights out of its reach, so that no value is
needed to export and every weight keeps its name.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import torch
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules
from torch.export import Dim

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.export.folder.artefact import OPSETS
from dualdiff_engine.export.graph.modules import Graph

_RULES = (
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.reshape_reshape_rule,
    rules.no_op_cast_rule,
    rules.no_op_transpose_rule,
    rules.no_op_expand_rule,
    rules.slice_split_rule,
)


@dataclass(frozen=True)
class Traced:
    """model: its weights are the graph's last inputs. weights: how each is stored.

    A weight is stored with its last two axes exchanged where the graph reads it so.
    """

    model: ir.Model
    weights: dict[str, bool]


def check_opset(opset: int) -> int:
    """Raises SettingsError."""
    if opset not in OPSETS:
        raise SettingsError(
            f"opset {opset!r} is not supported: use one of {', '.join(map(str, OPSETS))} "
            "(23 keeps attention as one operator)"
        )
    return opset


def trace(graph: Graph, opset: int) -> Traced:
    """Translate. Parameters may be on the meta device; their values are not read."""
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamo=True,
            opset_version=check_opset(opset),
            # forward(*background) names its inputs by position
            dynamic_shapes=_by_position(graph),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            external_data=False,
            optimize=False,
            verbose=False,
        )
    model: ir.Model = program.model
    weights = _hide_weights(model, graph.strip)
    _simplify(model)
    _widen_resizes(model)
    stored = {value.name or "": _absorb_transpose(value) for value in weights}
    common.RemoveUnusedNodesPass()(model)
    for value in weights:
        if not value.uses():
            model.graph.inputs.remove(value)
            del stored[value.name or ""]
    _name_axes(model, graph)
    return Traced(model, stored)


def _by_position(graph: Graph) -> tuple[Any, ...]:
    specs = [dict.fromkeys(graph.axes.get(name, {}), Dim.DYNAMIC) for name in graph.inputs]
    variadic = [name for name in graph.inputs if name.startswith("background_")]
    if not variadic:
        return tuple(specs)
    return (*specs[: -len(variadic)], tuple(specs[-len(variadic) :]))


def _hide_weights(model: ir.Model, strip: str) -> list[ir.Value]:
    """Initializers with the module's floating-point weights -> graph inputs, values dropped."""
    hidden = []
    for name, value in list(model.graph.initializers.items()):
        if not name.startswith(strip) or value.dtype is None or not value.dtype.is_floating_point():
            continue
        del model.graph.initializers[name]
        value.const_value = None
        value.name = name.removeprefix(strip)
        model.graph.inputs.append(value)
        hidden.append(value)
    return hidden


def _simplify(model: ir.Model) -> None:
    """The passes of onnxscript's optimizer that matter here: all of its rules take a minute."""
    common.InlinePass()(model)
    for _ in range(2):
        optimizer.fold_constants(model)
        rewriter.RewritePass(_RULES)(model)
        common.RemoveUnusedNodesPass()(model)
    for last in (
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        last(model)


def _widen_resizes(model: ir.Model) -> None:
    """Let every Resize in bfloat16 read and write float32, which changes no value.

    ONNX Runtime has no Resize in bfloat16, on any device. Concat and Reshape, which would do
    without one, are two to fifteen times slower than Resize in float32.
    """
    for node in [node for node in model.graph if node.op_type == "Resize"]:
        read, written = node.inputs[0], node.outputs[0]
        if read is None or read.dtype != ir.DataType.BFLOAT16:
            continue
        wide = ir.node("Cast", [read], {"to": ir.DataType.FLOAT})
        back = ir.node("Cast", [written], {"to": ir.DataType.BFLOAT16})
        narrow = back.outputs[0]
        narrow.shape, narrow.dtype = written.shape, ir.DataType.BFLOAT16
        wide.outputs[0].shape, wide.outputs[0].dtype = read.shape, ir.DataType.FLOAT
        ir.convenience.replace_all_uses_with(written, narrow)
        node.replace_input_with(0, wide.outputs[0])
        # the line above the last made the cast read itself
        back.replace_input_with(0, written)
        written.dtype = ir.DataType.FLOAT
        model.graph.insert_before(node, wide)
        model.graph.insert_after(node, back)


def _absorb_transpose(value: ir.Value) -> bool:
    """Let every Transpose of a weight's last two axes go, by storing it that way round."""
    nodes = [node for node, _ in value.uses()]
    rank = len(value.shape or ())
    swap = (*range(rank - 2), rank - 1, rank - 2)
    if rank < 2 or not all(
        node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == swap
        for node in nodes
    ):
        return False
    shape = value.shape
    assert shape is not None
    value.shape = ir.Shape([shape[axis] for axis in swap])
    for node in nodes:
        ir.convenience.replace_all_uses_with(node.outputs[0], value)
        if node.graph is not None:
            node.graph.remove(node, safe=True)
    return bool(nodes)


def _name_axes(model: ir.Model, graph: Graph) -> None:
    """torch's symbols (s7) -> what varies (rows), in every shape they appear in."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in graph.axes.get(value.name or "", {}).items():
            symbol = str((value.shape or ())[axis])
            if re.fullmatch(r"[su]\d+", symbol):
                names[symbol] = name
    if not names:
        return
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [
                d if isinstance(d, int) else pattern.sub(lambda m: names[m[1]], str(d))
                for d in value.shape
            ]
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, whose messages are for its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
