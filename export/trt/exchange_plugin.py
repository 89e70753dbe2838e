"""The exchange as a TensorRT plugin: PTX of the Triton kernel, put into an engine at its build.

TensorRT's quick plugins (`tensorrt.plugin`) take a kernel compiled ahead of time: PTX, a launch,
and integers that are passed between the inputs and the outputs. An engine with it runs without this
module, without Triton, without Python. Off by default: it has run on no GPU yet.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import GenericAlias
from typing import Any

import torch

from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.graph.exchange_operator import NAME, PLUGIN, nodes_of
from dualdiff_engine.export.trt import api as tensorrt_api
from dualdiff_engine.ops.reference import INTERACTION_EPS
from dualdiff_engine.ops.triton.tuning import Config

ID = f"{PLUGIN['plugin_namespace']}::{NAME}"
INPUTS = ("input", "gate_weight", "gate_bias", "value_weight", "value_bias", "residual")
# bytes; a kernel that takes more must be launched in a way that TensorRT does not promise
MOST_SHARED = 48 << 10
WARP = 32
# TensorRT promises how its own inputs and outputs are aligned and nothing of a plugin's, so the
# compiler is promised nothing either; then larger tiles than these spill
CONFIG = Config({"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=8, num_stages=2)
# by TensorRT's names
_DTYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Kernel:
    """A kernel for one number of channels.

    threads: of a block. shared: its bytes of shared memory. rows: the positions that it takes.
    """

    name: str
    ptx: str
    threads: int
    shared: int
    rows: int


def check_graph(path: Path) -> None:
    """That a denoiser's exchanges are nodes that the plugin may take, computing what it does.

    Raises SettingsError when the export keeps none, BackendError when it differs.
    """
    nodes = nodes_of(path)
    if not nodes:
        raise SettingsError(
            f"{path} holds no {NAME} operator for the plugin: export with --exchange-operator"
        )
    wanted = {name: value.encode() for name, value in PLUGIN.items()}
    for node in nodes:
        metadata = {attribute.name: attribute for attribute in node.attribute}
        named = {name: metadata[name].s for name in PLUGIN if name in metadata}
        # attributes are float32
        same = (
            "epsilon" in metadata and metadata["epsilon"].f == torch.tensor(INTERACTION_EPS).item()
        )
        if node.op_type != NAME or named != wanted or not same:
            raise BackendError(
                f"{path}: {node.name or node.op_type} is not the {NAME} operator of this release: "
                "export again with --exchange-operator"
            )


def taken(trt: Any, network: Any, asked: int) -> list[str]:
    """What a network's plugins are, once parsed: this one or none.

    asked: how many exchanges it must have taken. Raises BackendError where it took fewer.
    """
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    found = kinds.count(trt.LayerType.PLUGIN_V3)
    if found < asked:
        raise BackendError(
            f"tensorrt {trt.__version__} used the plugin for {found} of {asked} exchanges: build "
            "without the plugin, and please report this"
        )
    return [ID] if found else []


@cache
def compiled(channels: int, dtype: torch.dtype, gate_bias: torch.dtype, capability: str) -> Kernel:
    """The kernel's PTX for input [2, M, channels]; M is passed at every launch.

    gate_bias: its dtype. capability: as "9.0". Raises BackendError when Triton is missing, or the
    kernel needs more than TensorRT is known to give.
    """
    op = _triton_exchange()
    import triton
    from triton.backends.compiler import GPUTarget

    what = op.compilation(channels, dtype, CONFIG, eps=INTERACTION_EPS, gate_bias=gate_bias)
    source = triton.compiler.ASTSource(what.kernel, dict(what.signature), dict(what.constants))
    built = triton.compile(
        source,
        target=GPUTarget("cuda", int(capability.replace(".", "")), WARP),
        options={"num_warps": CONFIG.num_warps, "num_stages": CONFIG.num_stages},
    )
    metadata = built.metadata
    # TensorRT leaves Triton's own last two arguments null, as Triton does where these are empty
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch or metadata.shared > MOST_SHARED:
        raise BackendError(
            f"{what.name} needs {metadata.shared} bytes of shared memory and {scratch} of scratch "
            f"on {capability}; a plugin may use {MOST_SHARED} and 0: build without the plugin"
        )
    threads, rows = WARP * CONFIG.num_warps, CONFIG.blocks["BLOCK_M"]
    return Kernel(metadata.name, built.asm["ptx"], threads, metadata.shared, rows)


def _triton_exchange() -> Any:
    try:
        return importlib.import_module("dualdiff_engine.ops.triton.exchange")
    except ImportError as error:
        raise BackendError(
            "the exchange plugin needs Triton, which is not installed: pip install "
            "'dualdiff-engine[triton]', or build without the plugin"
        ) from error


@cache
def register(capability: str) -> None:
    """Let TensorRT's parser find the plugin, for GPUs of a compute capability, in this process.

    Raises BackendError when TensorRT or Triton is missing, or this TensorRT has no such plugins.
    """
    trt = tensorrt_api.package("tensorrt")
    _triton_exchange()
    plugin = importlib.import_module("tensorrt.plugin")
    if not hasattr(plugin, "KernelLaunchParams"):
        raise BackendError(
            f"tensorrt {trt.__version__} does not support plugins compiled ahead of time: use a "
            "newer version or build without the plugin"
        )

    def describe(
        input: Any, gate_weight: Any, gate_bias: Any, value_weight: Any, value_bias: Any,
        residual: Any,
    ) -> Any:  # fmt: skip
        return input.like()

    def launch(
        input: Any, gate_weight: Any, gate_bias: Any, value_weight: Any, value_bias: Any,
        residual: Any, outputs: Any, tactic: Any,
    ) -> Any:  # fmt: skip
        # of the biases alone the shape is known whatever shapes the graph computes
        channels = int(gate_bias.shape_expr[0].constant_value())
        dtype, gate = (_DTYPES[tensor.dtype.name] for tensor in (input, gate_bias))
        kernel = compiled(channels, dtype, gate, capability)
        positions = input.shape_expr[1]
        params = plugin.KernelLaunchParams(
            grid_x=plugin.cdiv(positions, kernel.rows),
            block_x=kernel.threads,
            shared_mem=kernel.shared,
        )
        integers = plugin.SymIntExprs(1)
        integers[0] = plugin.SymInt32(positions)
        return kernel.name, kernel.ptx, params, integers

    # TensorRT reads the classes themselves, not their names
    describe.__annotations__ = dict.fromkeys((*INPUTS, "return"), plugin.TensorDesc)
    returned = (str, str, plugin.KernelLaunchParams, plugin.SymIntExprs)
    launch.__annotations__ = {"return": GenericAlias(tuple, returned)}
    plugin.register(ID)(describe)
    plugin.aot_impl(ID)(launch)
