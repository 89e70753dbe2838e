"""What export/README.md tells a reader to run, run: its commands, its Python, its client."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.torch import save_file

from dualdiff_engine.cli import main
from dualdiff_engine.cli.main import app
from dualdiff_engine.export.graph import write
from serving import served
from small import LEAST, NAME, small_adapter, small_engine

README = Path(__file__).parent.parent.parent / "export" / "README.md"
OTHER = "bottle_contamination"
# a fenced block, and the remark before it that says why it is not run
BLOCK = re.compile(r"(<!-- not in the tests: [^\n]* -->\n)?```(\w+)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[str]:
    found = BLOCK.findall(README.read_text("utf-8"))
    return [code for remark, kind, code in found if kind == language and not remark]


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line and line[0] != "#"]


@pytest.fixture
def workplace(tmp_path: Path, exported_small: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README begins with. Graphs that were traced once are copied."""
    engine = small_engine(tmp_path / "sd15", LEAST)
    for seed, name in ((1, NAME), (2, OTHER)):
        save_file(small_adapter(engine, seed), tmp_path / f"{name}.safetensors")

    # before writing is replaced, as it is what traces them
    traced = {
        "float32": exported_small(LEAST),
        "bfloat16": exported_small(LEAST, precision="bfloat16"),
    }

    def reuse(engine: Any, folder: Path, options: write.ExportOptions, *_: Any) -> dict[str, Any]:
        shutil.copytree(traced[options.precision], folder, dirs_exist_ok=True)
        return {"graphs": {}}

    monkeypatch.setattr(write, "write_folder", reuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def endpoint(model: ModuleType) -> Iterator[Any]:
    """endpoint(repository): the address of a server that speaks the protocol to the model."""
    grpc = pytest.importorskip("grpc")
    service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
    server = grpc.server(ThreadPoolExecutor(1))

    def start(repository: Path) -> str:
        serving = served(model, repository, "dualdiff", 8)

        class Service(service.GRPCInferenceServiceServicer):
            def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
                (answer,) = serving.execute([arrays_of(request)])
                assert answer.error is None, answer.error
                return message_of(answer)

        service.add_GRPCInferenceServiceServicer_to_server(Service(), server)
        port = server.add_insecure_port("localhost:0")
        server.start()
        return f"localhost:{port}"

    yield start
    server.stop(None).wait()


def arrays_of(request: Any) -> dict[str, np.ndarray]:
    """Inputs of a request as the server hands them to a model."""
    from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

    assert request.model_name == "dualdiff"
    arrays = {}
    for entry, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if entry.datatype == "BYTES":
            flat = deserialize_bytes_tensor(raw)
        else:
            flat = np.frombuffer(raw, triton_to_np_dtype(entry.datatype))
        arrays[entry.name] = flat.reshape(tuple(entry.shape))
    return arrays


def message_of(answer: Any) -> Any:
    from tritonclient.grpc import service_pb2

    message = service_pb2.ModelInferResponse(model_name="dualdiff")
    for name in ("IMAGE", "ANOMALY", "MASK"):
        array = getattr(answer, name)
        message.outputs.add(name=name, datatype="UINT8", shape=array.shape)
        message.raw_output_contents.append(array.tobytes())
    return message


def test_it_is_true(workplace: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("bash"):
        for program, *arguments in commands(block):
            assert program == "dualdiff", "a command that is not ours needs a remark"
            assert main(arguments) == 0, arguments
    assert len(list((workplace / "pairs" / "image").iterdir())) == 2
    assert (workplace / "models" / "dualdiff" / "1" / "bundle" / "bundle.json").is_file()
    assert (workplace / "other_pairs" / "manifest.jsonl").is_file()

    space: dict[str, Any] = {}
    from_bundle, with_base, client = blocks("python")
    exec(from_bundle, space)  # noqa: S102
    assert f"['{OTHER}', '{NAME}'] CPUExecutionProvider" in capsys.readouterr().out
    exec(with_base, space)  # noqa: S102
    (again,) = space["engine"].generate(seeds=[1], steps=2)
    theirs, ours = np.asarray(space["pairs"][0].image), np.asarray(again.image)
    assert abs(theirs.astype(int) - ours).max() <= 1

    address = endpoint(workplace / "models")
    assert "localhost:8001" in client
    exec(client.replace("localhost:8001", address), space)  # noqa: S102
    assert space["images"].shape == (2, 128, 128, 3)
    assert space["masks"].shape == (2, 128, 128)


def test_the_tables_name_every_graph_and_option() -> None:
    from dualdiff_engine.export.folder.artefact import LAYOUTS

    text = README.read_text("utf-8")
    for graph in LAYOUTS:
        assert f"`{graph}.onnx`" in text
    shown = set(re.findall(r"--[a-z][a-z-]+", text))
    # the server's, and the benchmark's
    known = {"--model-repository", "--tensorrt-rtx"}
    assert shown - known <= options_of(typer.main.get_command(app))


def options_of(command: Any) -> set[str]:
    """Every option that a command or one of its subcommands takes."""
    own = {
        name for parameter in command.params for name in parameter.opts + parameter.secondary_opts
    }
    return own.union(*(options_of(sub) for sub in getattr(command, "commands", {}).values()))
