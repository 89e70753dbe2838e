"""dualdiff-bench: what it counts, what it records, what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dualdiff_engine.bench import cli, readme
from dualdiff_engine.bench.step import measure, peers, report, workers
from dualdiff_engine.bench.step.case import Case, RandomWeights, random_adapter
from dualdiff_engine.errors import BackendError, DualDiffError

TINY = ["--batch", "1", "--size", "64", "--rounds", "1"]


def sd15(*, background: bool) -> Case:
    return Case("sd15", 1, 50, 64, 64, 2.5, background, 0)


@pytest.mark.parametrize("background", [False, True])
def test_flops_of_the_full_network(background: bool) -> None:
    released = measure.count_flops(sd15(background=background), "released")
    engine = measure.count_flops(sd15(background=background), "engine")
    # counted independently of this code: 3.76 TFLOP plain, about 5.4 with background
    assert released / 1e12 == pytest.approx(5.42 if background else 3.76, abs=0.01)
    assert engine / released <= (0.62 if background else 0.88)


def test_flops_of_fresh_noise_include_the_pass() -> None:
    case = sd15(background=True)
    extra = measure.count_flops(case, "engine-fresh") - measure.count_flops(case, "engine")
    # two plain rows, less what follows the last recorded share
    assert 1.5e12 < extra < 2 * 0.8033e12


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    one, two = (RandomWeights({"a.weight": (4, 3), "b.weight": (4, 3)}, 0) for _ in range(2))
    assert torch.equal(one["a.weight"], two["a.weight"])
    assert not torch.equal(one["a.weight"], one["b.weight"])
    assert not torch.equal(one["a.weight"], RandomWeights(one.shapes, 1)["a.weight"])


def test_random_adapter_is_in_the_released_format() -> None:
    adapter = random_adapter(RandomWeights.of("small", 0), background=True)
    assert adapter.rank == 32
    assert adapter.has_background
    assert len(adapter.sites) == 32


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    cli.main(
        [
            *(*TINY, "--peers", "released,engine,engine-fresh", "--background"),
            *("--output-json", str(folder / "r.json"), "--plot", str(folder / "r.png")),
        ]
    )
    assert (folder / "r.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "r.json").read_text())


def test_record(record: dict[str, Any]) -> None:
    assert record["case"]["model"] == "demo"
    assert [row["peer"] for row in record["peers"]] == ["released", "engine", "engine-fresh"]
    for row in record["peers"]:
        ms = row["ms_per_step"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
        assert row["peak_bytes"] > 1e8
        assert row["flops_per_s"] == pytest.approx(row["flops_per_step"] / ms["p50"] * 1e3)
        assert row["error_to_released"] <= 1e-5
    assert record["peers"][0]["speedup_over_released"] == 1
    assert record["versions"]["torch"] == torch.__version__


def test_tables(record: dict[str, Any]) -> None:
    text, markdown = report.text_table(record), report.step_table(record)
    assert len(text.splitlines()) == 4
    assert len(markdown.splitlines()) == 5
    assert "engine-fresh" in text
    assert "with background" in report.headline(record)


@pytest.mark.parametrize(
    ("arguments", "calls"),
    [
        ([], 100), (["--background"], 50), (["--preset", "released"], 101),
        (["--preset", "released", "--background"], 51), (["--preset", "fast"], 20),
        (["--preset", "fast", "--calls", "25"], 25),
    ],
)  # fmt: skip
def test_a_preset_gives_the_calls(arguments: list[str], calls: int) -> None:
    assert cli._case(cli.parser().parse_args(arguments), on_gpu=False).steps == calls


def test_the_case_line_names_the_preset(record: dict[str, Any]) -> None:
    assert "schedule of 50 calls;" in report.headline(record)
    case = {**record["case"], "steps": 20, "preset": "fast"}
    assert "schedule of 20 calls (preset fast);" in report.headline({**record, "case": case})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--size", "65"], "--size a multiple of 8"),
        (["--calls", "0"], "--calls must be 1 to 1000"),
        (["--steps", "1001"], "--calls must be 1 to 1000"),
        (["--guidance", "1"], "--guidance must be above 1"),
        (["--dtype", "int8"], "no dtype 'int8': choose one of float32"),
        (["--dtype", "float16", "--device", "cpu"], "float16 on a CPU is emulated"),
        (["--peers", "engine,tensorflow"], "no peer 'tensorflow'"),
        (["--peers", "engine-fresh"], "engine-fresh needs --background"),
        (["--device", "tpu"], "no device 'tpu'"),
        (["--output-json", "no/such/folder/r.json"], "no folder 'no/such/folder'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("dualdiff-bench: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("peer", "device", "dtype", "absent", "message"),
    [
        ("engine-onnxruntime", CPU, "bfloat16", (), "no products in bfloat16 on a CPU: use float3"),
        ("engine-onnxruntime", CPU, "float32", ("onnxruntime",), r"pip install .*\[onnx\]"),
        ("engine-onnxruntime", CPU, "float32", ("onnx",), r"needs onnx: pip install .*\[onnx\]"),
        ("engine-onnxruntime", CPU, "float32", ("onnxscript",), "needs onnxscript: pip install"),
        ("engine-onnxruntime", CUDA, "float32", (), "cannot run on cuda: it offers .*CPUExecution"),
        (
            *("engine-tensorrt", CPU, "float16", ("tensorrt", "tensorrt_rtx")),
            r"TensorRT is not installed: pip install .*\[tensorrt\]",
        ),
    ],
)
def test_a_peer_is_refused_with_the_reason(
    peer: str,
    device: torch.device,
    dtype: str,
    absent: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for package in absent:
        monkeypatch.setitem(sys.modules, package, None)
    if device.type == "cuda":
        onnxruntime = pytest.importorskip("onnxruntime")
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match=f"peer '{peer}' cannot run here: .*{message}"):
        peers.require(peer, device, getattr(torch, dtype))


def test_tensorrt_is_refused_where_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualdiff_engine.export.trt.api.installed", lambda: "tensorrt")
    with pytest.raises(BackendError, match="TensorRT runs on NVIDIA GPUs, the engine is on cpu"):
        peers.require("engine-tensorrt", CPU, torch.float16)
    monkeypatch.setattr("dualdiff_engine.export.run.engine.check_runtime", lambda *_: None)
    with pytest.raises(BackendError, match="no fused attention in float32: use bfloat16 or float1"):
        peers.require("engine-tensorrt", CUDA, torch.float32)
    peers.require("engine-tensorrt", CUDA, torch.float16)


def test_every_peer_has_its_name_in_the_help() -> None:
    assert sorted(cli.PEER_NAMES) == sorted(peers.PEERS)


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_committed_records_are_what_the_readmes_show(document: str) -> None:
    root = Path(__file__).parents[2]
    assert readme.generate(document, root) == (root / document).read_text("utf-8")


def test_an_export_that_does_not_build_says_why() -> None:
    path = Path(__file__).parents[2] / "bench" / "results" / "cpu-sd15-export.json"
    record = json.loads(path.read_text("utf-8"))
    assert "all 32 attentions fused" in report.export_headline(record)
    record["tensorrt_rtx"] = {"precision": "float16", "error": "no kernel"}
    assert report.export_headline(record).endswith("the denoiser alone in float16: no kernel")
    del record["tensorrt_rtx"]
    assert "TensorRT" not in report.export_headline(record)


def test_a_peer_that_dies_is_named() -> None:
    case = Case("small", 1, 10, 8, 8, 2.5, False, 0)
    with workers.Worker(case, workers.Entry("engine", "float32"), "cpu") as worker:
        worker.process.kill()
        worker.process.join()
        with pytest.raises(DualDiffError, match=r"peer engine float32 died \(exit -9\)"):
            worker.step(0)
