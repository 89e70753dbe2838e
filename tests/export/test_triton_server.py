"""The serving repository: its config by the server's own schema, its model by a server's calls."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dualdiff_engine import Engine
from dualdiff_engine.cli import main
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.serve.triton_server import Serving, config, write_repository
from serving import served
from support import Golden


@pytest.fixture
def repository(golden: Golden, bundle: Any, tmp_path: Path) -> Path:
    out = tmp_path / "repository"
    serving = Serving("pairs", "cpu", instances=2, max_batch=4, delay_us=500)
    write_repository(bundle(golden.name), out, serving)
    return out


def test_config_by_the_published_schema(golden: Golden, repository: Path) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    read = text_format.Parse(
        (repository / "pairs" / "config.pbtxt").read_text(), schema.ModelConfig()
    )
    assert (read.name, read.backend, read.max_batch_size) == ("pairs", "python", 4)
    assert read.instance_group[0].count == 2
    assert read.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    assert read.dynamic_batching.max_queue_delay_microseconds == 500
    inputs = {entry.name: entry for entry in read.input}
    assert inputs["SEED"].data_type == schema.TYPE_INT64
    assert not inputs["SEED"].optional
    assert inputs["STEPS"].optional
    # a bundle may hold adapters of both kinds
    assert inputs["BACKGROUND"].optional
    assert read.parameters["adapter"].string_value == "adapter"
    assert [entry.name for entry in read.output] == ["IMAGE", "ANOMALY", "MASK", "RECIPE"]
    (warm,) = read.model_warmup
    assert ("BACKGROUND" in warm.inputs) == golden.background
    steps = repository / "pairs" / "warmup" / warm.inputs["STEPS"].input_data_file
    assert np.frombuffer(steps.read_bytes(), np.int32).tolist() == [1]


@pytest.mark.parametrize("trust", [False, True])
def test_engines_of_others_are_run_when_the_repository_says_so(
    bundle: Any, model: ModuleType, monkeypatch: pytest.MonkeyPatch, trust: bool
) -> None:
    """Written into the config, handed to the model by the server, and by it to the engine."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import json_format, text_format

    manifest = json.loads((bundle("dual") / "bundle.json").read_text())
    written = config(manifest, Serving(device="cpu", trust=trust))
    told = json_format.MessageToJson(
        text_format.Parse(written, schema.ModelConfig()), preserving_proto_field_name=True
    )
    asked: dict[str, Any] = {}

    def from_bundle(path: Path, **options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(active_adapter=options["adapter"])

    monkeypatch.setattr(model.Engine, "from_bundle", from_bundle)
    model.TritonPythonModel().initialize(
        {
            "model_config": told,
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
            "model_repository": "models/dualdiff",
            "model_version": "1",
        }
    )
    assert asked == {"adapter": "adapter", "device": "cpu", "max_batch": 8, "trust": trust}


def request_of(golden: Golden, seeds: list[int], steps: int = 1, **more: Any) -> dict[str, Any]:
    request = {
        "SEED": np.array([[seed] for seed in seeds], np.int64),
        "STEPS": np.array([[steps]] * len(seeds), np.int32),
        **more,
    }
    if golden.background:
        picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        request["BACKGROUND"] = np.stack([picture] * len(seeds))
    return request


def test_requests_are_joined_and_answered_in_order(
    golden: Golden, repository: Path, model: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = served(model, repository)
    drawn: list[list[int]] = []
    generate = serving.engine.generate

    def counted(seeds: list[int], **options: Any) -> Any:
        drawn.append(seeds)
        return generate(seeds, **options)

    monkeypatch.setattr(serving.engine, "generate", counted)
    name = np.array([[b"nobody"]], dtype=object)
    requests = [
        request_of(golden, [1]),
        request_of(golden, [7], steps=2),
        request_of(golden, [2, 3]),
        request_of(golden, [4], ADAPTER=name),
        {"STEPS": np.array([[1]], np.int32)},
        request_of(golden, [5], STEPS=np.array([[0]], np.int32)),
    ]
    answers = serving.execute(requests)
    assert drawn == [[1, 2, 3], [7], [5]]
    assert [answer.error is None for answer in answers] == [True, True, True, False, False, False]
    assert "no adapter 'nobody' is loaded" in answers[3].error
    assert "SEED is missing" in answers[4].error
    assert "steps must be" in answers[5].error
    assert answers[2].IMAGE.shape == (2, 128, 128, 3)
    assert answers[2].MASK.shape == (2, 128, 128)
    assert answers[2].IMAGE.dtype == np.uint8
    seeds = [json.loads(recipe[0])["seed"] for recipe in answers[2].RECIPE]
    assert seeds == [2, 3]
    # the same pair as from the bundle itself
    serving.finalize()
    if not golden.background:
        engine = Engine.from_bundle(repository / "pairs" / "1" / "bundle")
        (pair,) = engine.generate([2], steps=1)
        difference = np.asarray(pair.image).astype(int) - answers[2].IMAGE[0]
        assert abs(difference).max() <= 1


def test_what_differs_within_a_request(golden: Golden, repository: Path, model: ModuleType) -> None:
    steps = np.array([[1], [2]], np.int32)
    (answer,) = served(model, repository).execute([request_of(golden, [1, 2], STEPS=steps)])
    assert "STEPS differs within one request" in answer.error


def test_what_is_refused(bundle: Any, tmp_path: Path) -> None:
    for wrong in ({"name": "../x"}, {"name": ""}, {"device": "tpu"}, {"instances": 0}):
        with pytest.raises(SettingsError):
            Serving(**wrong)
    with pytest.raises(BackendError, match="max_batch 65 is above 64, the most that"):
        write_repository(bundle("dual"), tmp_path / "out", Serving(max_batch=65))
    assert main(["export", "triton-server", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_command_line(bundle: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", "triton-server", str(bundle("dual")), "--out", str(out), "--quiet"]) == 0
    manifest = json.loads((bundle("dual") / "bundle.json").read_text())
    assert (out / "dualdiff" / "config.pbtxt").read_text() == config(manifest, Serving())
