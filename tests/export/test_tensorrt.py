"""TensorRT: engines built without a GPU by TensorRT-RTX, and what is checked before one is loaded.

Running an engine needs a GPU: what does is held here to the names of the real API.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dualdiff_engine import BackendError, Engine, SettingsError
from dualdiff_engine.bench.step.case import RandomWeights, random_adapter
from dualdiff_engine.export.folder.artefact import read_artefacts
from dualdiff_engine.export.run.denoiser import initializers
from dualdiff_engine.export.trt import (
    api as tensorrt_api,
)
from dualdiff_engine.export.trt import (
    build as tensorrt_build,
)
from dualdiff_engine.export.trt import (
    runner as tensorrt_runner,
)
from dualdiff_engine.export.trt.build import BuildOptions
from dualdiff_engine.files import sha256_of, sha256_of_tensors
from support import DATA
from tensorrt_stubs import bindings

__all__ = ["bindings"]

TARGET = "8.9"
OPTIONS = BuildOptions("tensorrt-rtx", (TARGET,), (64,))
# two levels, heads of 40 and 80 channels: those that TensorRT has fused attention for
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (80, 160),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """tiny(background): the fp16 export of a small network, made once."""
    from diffusers import UNet2DConditionModel

    from dualdiff_engine.export.graph.write import ExportOptions, export_onnx

    root = tmp_path_factory.mktemp("tiny")
    made: dict[bool, Path] = {}
    base = root / "base"

    def get(background: bool) -> Path:
        if not base.exists():
            shutil.copytree(DATA / "dual/model", base, ignore=shutil.ignore_patterns("unet"))
            torch.manual_seed(0)
            UNet2DConditionModel(**UNET).save_pretrained(base / "unet")
        if background not in made:
            with Engine.from_pretrained(base, device="cpu") as engine:
                shapes = {name: tuple(x.shape) for name, x in engine.base.unet.items()}
                weights = RandomWeights(shapes, 1)
                adapter = random_adapter(weights, background=background, rank=4)
                engine.keep_adapter(adapter, "tiny")
                folder = root / ("background" if background else "plain")
                export_onnx(engine, folder, ExportOptions(precision="float16", batches=(1, 3)))
            made[background] = folder
        return made[background]

    return get


@pytest.mark.parametrize(
    ("background", "attentions"),
    # one on the way down, one in the middle, two on the way up, each with self and text; the
    # background's pass ends at the last self-attention's keys
    [(False, {"denoiser": 8}), (True, {"denoiser_background": 8, "background_encoder": 6})],
    ids=["plain", "background"],
)
def test_every_attention_gets_a_kernel_of_its_own(
    tiny: Any, background: bool, attentions: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT refuses an attention without one: a plan shows that all were taken."""
    pytest.importorskip("tensorrt_rtx")
    folder = tiny(background)
    monkeypatch.setattr(tensorrt_api, "REPORT_SECONDS", 0.0)
    said: list[str] = []
    built = tensorrt_build.build(folder, OPTIONS, said.append)
    graphs = read_artefacts(folder)
    engine = Engine.from_pretrained(
        folder.parent / "base", exported=folder, backend="onnxruntime", device="cpu"
    )
    assert {one.graph: one.attentions for one in built} == attentions
    for one in built:
        plan = folder / one.file
        assert plan.name == f"{one.graph}.sm_89.plan"
        assert plan.stat().st_size == one.plan_bytes
        told = json.loads(Path(f"{plan}.json").read_text())
        assert told["profiles"] == [[1, 64]]
        assert told["targets"] == [TARGET]
        assert told["plugins"] == []
        assert told["graph_sha256"] == sha256_of(folder / f"{one.graph}.onnx")
        assert told["adapter"]["name"] == "tiny"
        # what an engine with that adapter brings to a runner: a plan needs no refitting for it
        brought = initializers(engine.denoiser._changed, graphs[one.graph])
        assert told["weights_sha256"] == sha256_of_tensors(brought)
        # what the builder is at
        about = [line.removeprefix(f"{one.graph}: ") for line in said if one.graph in line]
        assert about[0] == f"building for {TARGET}"
        assert len([line for line in about if re.search(r"\d+ of \d+$", line)]) > 1


def test_the_adapters_weights_keep_their_names(tiny: Any) -> None:
    """What a refit replaces is found by the parser under the names of the export."""
    trt = pytest.importorskip("tensorrt_rtx")
    for background in (False, True):
        folder = tiny(background)
        for name, artefact in read_artefacts(folder).items():
            if name in tensorrt_build.GRAPHS:
                builder = tensorrt_build._Builder(
                    trt, "tensorrt-rtx", folder, artefact, (TARGET,), OPTIONS
                )
                assert artefact.adapter_weights
                builder._mark(builder._parse())


def test_heads_without_a_fused_kernel_are_told(exported: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = exported("dual", precision="float16")
    with pytest.raises(BackendError, match=r"denoiser.onnx could not be built .* dedicated kernel"):
        tensorrt_build.build(folder, OPTIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": ()}, "batches must be ascending"),
        ({"batches": (8, 1)}, "batches must be ascending"),
        ({"batches": (0, 8)}, "at least 1"),
        ({"flavour": "tensorrt"}, "targets need tensorrt-rtx"),
    ],
)
def test_wrong_options(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        replace(OPTIONS, **change)


def test_exports_that_cannot_be_built(exported: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(SettingsError, match="exported in float32, but TensorRT has no fused"):
        tensorrt_build.build(exported("dual"), OPTIONS)
    folder = exported("dual", precision="float16")
    with pytest.raises(SettingsError, match="batches go up to 65, the export up to 64"):
        tensorrt_build.build(folder, replace(OPTIONS, batches=(65,)))
    with pytest.raises(
        BackendError, match=r"cannot build for compute capability 1\.2: choose .*8\.9"
    ):
        tensorrt_build.build(folder, replace(OPTIONS, targets=("1.2",)))


def test_ranges_of_batches_are_profiles() -> None:
    assert BuildOptions(batches=(1, 8, 32)).ranges == [(1, 1), (2, 8), (9, 32)]
    profiles = [[1, 1], [2, 8], [9, 32]]
    chosen = [tensorrt_runner.profile_of(profiles, batch) for batch in (1, 2, 8, 9, 32)]
    assert chosen == [0, 1, 1, 2, 2]
    with pytest.raises(BackendError, match=r"a batch of 33 is above 32, .* --batches …,33"):
        tensorrt_runner.profile_of(profiles, 33)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(BackendError, match=r"tensorrt-rtx is not installed: .*\[tensorrt-rtx\]"):
        tensorrt_api.package("tensorrt-rtx")
    with pytest.raises(BackendError, match="TensorRT is not installed"):
        tensorrt_api.installed()
    with pytest.raises(BackendError, match="no TensorRT flavour 'trt'"):
        tensorrt_api.package("trt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = type("old", (), {"__version__": "10.9.0.34"})
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", old)
    with pytest.raises(BackendError, match=r"tensorrt 10\.9\.0\.34 is older than 10\.13"):
        tensorrt_api.package("tensorrt")


def test_building_for_this_gpu_needs_one(exported: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(BackendError, match="there is none: use tensorrt-rtx with --target"):
        tensorrt_build.build(
            exported("dual", precision="float16"), BuildOptions(flavour="tensorrt-rtx")
        )


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_it_speaks_the_real_api(flavour: str, request: pytest.FixtureRequest) -> None:
    """Every name that only a GPU, or only TensorRT itself, would reach."""
    if flavour == "tensorrt":
        trt = request.getfixturevalue("bindings")
    else:
        trt = pytest.importorskip("tensorrt_rtx")
    names = {
        trt.Builder: [
            "create_network", "create_builder_config", "create_optimization_profile",
            "build_serialized_network",
        ],
        trt.IBuilderConfig: [
            "set_flag", "add_optimization_profile", "progress_monitor", "create_timing_cache",
            "set_timing_cache", "get_timing_cache",
        ],
        trt.ITimingCache: ["serialize"],
        trt.IProgressMonitor: ["phase_start", "step_complete", "phase_finish"],
        trt.OnnxParser: ["parse_from_file", "num_errors", "get_error"],
        trt.BuilderFlag: ["REFIT_INDIVIDUAL"],
        trt.INetworkDefinition: ["mark_weights_refittable", "num_layers", "get_layer"],
        trt.LayerType: ["ATTENTION_INPUT", "PLUGIN_V3"],
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: [
            "num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype",
            "create_execution_context",
        ],
        trt.IExecutionContext: [
            "set_input_shape", "set_tensor_address", "get_tensor_shape", "execute_async_v3",
            "set_optimization_profile_async",
        ],
        trt.Refitter: ["get_all_weights", "set_named_weights", "refit_cuda_engine"],
        trt.TensorIOMode: ["INPUT"],
        trt.TensorLocation: ["HOST"],
        trt.DataType: list(tensorrt_runner._DTYPES),
    }  # fmt: skip
    for owner, needed in names.items():
        assert all(hasattr(owner, name) for name in needed), owner
    weights = trt.Weights(trt.DataType.HALF, torch.zeros(4).half().data_ptr(), 4)
    assert weights.size == 4
