"""The exchange as a TensorRT plugin, as far as it goes without a GPU.

What TensorRT would get is compiled and read: PTX, launch, arguments. Its Python is TensorRT's own
where the bindings are installed, over libraries that do nothing, and a stand-in everywhere.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from dualdiff_engine.bench.gpu import aot
from dualdiff_engine.cli import main
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.trt import build as tensorrt_build
from dualdiff_engine.export.trt import exchange_plugin
from dualdiff_engine.export.trt.build import BuildOptions
from dualdiff_engine.ops.triton import exchange as op
from small import LEAST
from tensorrt_stubs import bindings

HERE = "8.9"
__all__ = ["bindings"]

# a parameter of the entry, as Triton writes them
PARAMETER = re.compile(r"\.param \.(u\d+)(?: \.ptr[^\n]*?)? \w+_param_(\d+)")
# pointers, the number of positions, the output; then Triton's two for scratch memory
ABI = ["u64"] * 6 + ["u32"] + ["u64"] + ["u64"] * 2


@pytest.fixture(autouse=True)
def _registered_nowhere() -> Any:
    exchange_plugin.register.cache_clear()
    yield
    exchange_plugin.register.cache_clear()


def compiled(channels: int, dtype: torch.dtype, capability: str = HERE) -> exchange_plugin.Kernel:
    return exchange_plugin.compiled(channels, dtype, torch.float32, capability)


@pytest.mark.parametrize(
    ("channels", "dtype", "capability"),
    [(320, torch.float16, "8.9"), (1280, torch.bfloat16, "9.0"), (640, torch.float16, "8.0")],
)
def test_the_kernel_takes_what_tensorrt_passes(
    channels: int, dtype: torch.dtype, capability: str
) -> None:
    """Inputs, integers, output; PTX and launch agree; it assembles, without spills."""
    kernel = compiled(channels, dtype, capability)
    entry = kernel.ptx[kernel.ptx.index(f".entry {kernel.name}(") :]
    head = entry[: entry.index("{")]
    assert [kind for kind, _ in PARAMETER.findall(head)] == ABI
    assert re.search(r"\.reqntid (\d+)", head)[1] == str(kernel.threads)
    loaded = {int(n) for n in re.findall(rf"\[{kernel.name}_param_(\d+)\]", entry)}
    # TensorRT passes nothing for Triton's own
    assert loaded == set(range(8))
    fixed = {"eps", "CHANNELS", *exchange_plugin.CONFIG.blocks}
    runtime = [name for name in op._exchange_kernel.arg_names if name not in fixed]
    assert runtime == [*(f"{name}_ptr" for name in exchange_plugin.INPUTS), "positions", "out_ptr"]
    assert kernel.shared <= exchange_plugin.MOST_SHARED
    report = aot.assembler_report(kernel.ptx, int(capability.replace(".", "")))
    registers, spills = aot.counted(report)
    assert spills == 0
    assert registers <= 255


def test_the_gates_bias_is_read_as_wide_as_it_is() -> None:
    """Of another dtype it is another kernel: TensorRT passes a pointer and no type."""
    wide = exchange_plugin.compiled(80, torch.float16, torch.float32, HERE)
    narrow = exchange_plugin.compiled(80, torch.float16, torch.float16, HERE)
    assert wide.ptx != narrow.ptx


def test_a_kernel_too_large_for_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_plugin, "MOST_SHARED", 1024)
    with pytest.raises(BackendError, match=r"bytes of shared memory .* may use 1024 and 0"):
        exchange_plugin.compiled(48, torch.float16, torch.float32, HERE)


class Expression(int):
    """A dimension as TensorRT gives it: known, or to be computed at run time."""

    def constant_value(self) -> int:
        assert self >= 0, "not known when the engine is built"
        return int(self)


class StandIn(ModuleType):
    """What `tensorrt.plugin` offers that the plugin uses; numbers in place of expressions."""

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.functions: dict[str, Callable[..., Any]] = {}
        self.TensorDesc, self.SymInt32 = SimpleNamespace, int
        self.SymIntExprs = type("SymIntExprs", (list,), {"__init__": self._empty})
        self.KernelLaunchParams = type("KernelLaunchParams", (SimpleNamespace,), {})

    @staticmethod
    def _empty(made: list[Any], length: int) -> None:
        made.extend([None] * length)

    @staticmethod
    def cdiv(first: int, second: int) -> int:
        return -(-first // second)

    def register(self, name: str) -> Callable[..., None]:
        return lambda function: self.functions.update({f"register {name}": function})

    def aot_impl(self, name: str) -> Callable[..., None]:
        return lambda function: self.functions.update({f"aot_impl {name}": function})


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    plugin = StandIn()
    trt: Any = ModuleType("tensorrt")
    trt.__version__, trt.plugin = "11.4.0", plugin
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)
    return plugin


def tensors(positions: int, channels: int) -> list[SimpleNamespace]:
    wide, line = (2, positions, channels), (channels,)
    shapes = [wide, (channels, channels), line, (channels, channels), line, wide]
    return [
        SimpleNamespace(
            shape_expr=[Expression(size) for size in shape],
            dtype=SimpleNamespace(name="FLOAT" if index == 2 else "HALF"),
        )
        for index, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(("positions", "blocks"), [(1, 1), (32, 1), (33, 2), (4096 * 32, 4096)])
def test_the_launch_covers_every_position(stand_in: StandIn, positions: int, blocks: int) -> None:
    exchange_plugin.register(HERE)
    launch = stand_in.functions[f"aot_impl {exchange_plugin.ID}"]
    name, ptx, params, integers = launch(*tensors(positions, 80), None, None)
    kernel = compiled(80, torch.float16)
    assert (name, ptx) == (kernel.name, kernel.ptx)
    assert vars(params) == {"grid_x": blocks, "block_x": 256, "shared_mem": kernel.shared}
    assert integers == [positions]


class Number:
    """In place of TensorRT's expressions, which its library makes: evaluated at once."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value


class Arithmetic:
    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, kind: Any, first: Number, second: Number) -> Number:
        a, b = first.value, second.value
        return Number({"SUM": a + b, "CEIL_DIV": -(-a // b) if b else 0}[kind.name])


def test_tensorrts_own_python_takes_it(bindings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checks of signatures, its creator, its launch parameters."""
    exchange_plugin.register(HERE)
    plugin = importlib.import_module("tensorrt.plugin")
    creator = bindings.get_plugin_registry().get_creator("Exchange", "1", "dualdiff")
    made = creator.create_plugin(
        "Exchange", "dualdiff", bindings.PluginFieldCollection([]),
        bindings.TensorRTPhase.BUILD, bindings.QuickPluginCreationRequest.UNKNOWN,
    )  # fmt: skip
    assert isinstance(made, bindings.IPluginV3QuickAOTBuild)
    half, wide = bindings.DataType.HALF, bindings.DataType.FLOAT
    types = [half, half, wide, half, half, half]
    assert list(made.get_output_data_types(types, [3, 2, 1, 2, 1, 3])) == [half]

    monkeypatch.setattr(bindings, "IDimensionExpr", Number)
    monkeypatch.setattr(plugin._tensor.SymIntExpr, "_exprBuilder", Arithmetic())
    given = []
    for like, dtype in zip(tensors(130, 80), types, strict=True):
        shape = plugin.ShapeExprs.from_tuple(
            [plugin.ShapeExpr(n) for n in map(int, like.shape_expr)]
        )
        given.append(plugin.TensorDesc(shape, dtype))
    name, ptx, params, integers = made.aot_impl_function(*given, [given[0].like()], None)
    kernel = compiled(80, torch.float16)
    assert (name, ptx) == (kernel.name, kernel.ptx)
    assert isinstance(params, plugin.KernelLaunchParams)
    asked = {n: getattr(params, n)._expr.value for n in ("grid_x", "grid_y", "grid_z", "block_x")}
    assert asked == {"grid_x": 5, "grid_y": 1, "grid_z": 1, "block_x": 256}
    assert params.shared_mem._expr.value == kernel.shared
    assert [(type(n), n._expr.value) for n in integers] == [(plugin.SymInt32, 130)]


def test_it_is_registered_once(stand_in: StandIn) -> None:
    exchange_plugin.register(HERE)
    stand_in.functions.clear()
    exchange_plugin.register(HERE)
    assert not stand_in.functions


def test_what_it_needs_is_named(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    del stand_in.KernelLaunchParams
    with pytest.raises(
        BackendError, match=r"tensorrt 11\.4\.0 does not support plugins .* newer version"
    ):
        exchange_plugin.register(HERE)
    monkeypatch.setitem(sys.modules, "dualdiff_engine.ops.triton.exchange", None)
    with pytest.raises(BackendError, match=r"pip install 'dualdiff-engine\[triton\]'"):
        exchange_plugin.register(HERE)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"pip install 'dualdiff-engine\[tensorrt\]'"):
        exchange_plugin.register(HERE)


@pytest.fixture
def folder(exported_small: Any) -> Path:
    return exported_small(LEAST, precision="float16", exchange_operator=True)


def test_the_nodes_name_the_plugin(folder: Path) -> None:
    """By the names that TensorRT's parser looks for before it takes the body."""
    path = folder / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = [node for node in model.graph.node if node.op_type == "Exchange"]
    assert len(nodes) == 2
    for node in nodes:
        told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert told.pop("epsilon") == pytest.approx(1e-6)
        assert told == {"plugin_namespace": b"dualdiff", "plugin_version": b"1"}
        assert len(node.input) == len(exchange_plugin.INPUTS)
    exchange_plugin.check_graph(path)


def test_without_a_plugin_the_body_is_built(folder: Path) -> None:
    """The same file, by a TensorRT that has none."""
    pytest.importorskip("tensorrt_rtx")
    (built,) = tensorrt_build.build(folder, BuildOptions("tensorrt-rtx", (HERE,), (8,)))
    assert built.attentions == 2


@pytest.mark.parametrize(("kinds", "asked"), [("PPa", 2), ("aaa", 0), ("Paa", 0)])
def test_what_was_taken_is_told(kinds: str, asked: int) -> None:
    """Also where an earlier build in the process registered it, and this one did not ask."""
    expected = [exchange_plugin.ID] if "P" in kinds else []
    assert exchange_plugin.taken(*parsed(kinds), asked) == expected


def test_a_body_in_place_of_the_plugin_is_refused() -> None:
    with pytest.raises(BackendError, match="used the plugin for 1 of 2 exchanges"):
        exchange_plugin.taken(*parsed("Pab"), 2)


def parsed(kinds: str) -> tuple[Any, Any]:
    """(TensorRT, a network of these layers), P for a plugin's."""
    trt = SimpleNamespace(__version__="11.4.0", LayerType=SimpleNamespace(PLUGIN_V3="P"))
    layers = [SimpleNamespace(type=kind) for kind in kinds]
    return trt, SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)


def _change(name: str, value: Any) -> Callable[[onnx.NodeProto], None]:
    def change(node: onnx.NodeProto) -> None:
        kept = [attribute for attribute in node.attribute if attribute.name != name]
        del node.attribute[:]
        node.attribute.extend(kept)
        if value is not None:
            node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


@pytest.mark.parametrize(
    "change",
    [
        _change("epsilon", 1e-5),
        _change("epsilon", None),
        _change("plugin_namespace", "other"),
        _change("plugin_version", None),
        lambda node: setattr(node, "op_type", "Swap"),
    ],
)
def test_another_operator_is_refused(folder: Path, copy_of: Any, change: Any) -> None:
    path = copy_of(folder) / "denoiser.onnx"
    model = onnx.load(path, load_external_data=False)
    change(next(node for node in model.graph.node if node.domain == "com.dualdiff"))
    onnx.save(model, path)
    with pytest.raises(BackendError, match="is not the Exchange operator of this release"):
        exchange_plugin.check_graph(path)


def test_exports_and_flavours_without_plugins(
    exported_small: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SettingsError, match="export with --exchange-operator"):
        exchange_plugin.check_graph(exported_small(LEAST) / "denoiser.onnx")
    if importlib.util.find_spec("tensorrt_rtx"):
        options = ["--flavour", "tensorrt-rtx", "--target", HERE, "--exchange-plugin"]
        assert main(["export", "tensorrt", str(folder), *options]) == 2
        assert "tensorrt-rtx does not support plugins" in capsys.readouterr().err
