"""`dualdiff export …`, and `dualdiff verify` of bundles. Slow imports happen when a verb runs."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.settings import size_from_text

if TYPE_CHECKING:
    from dualdiff_engine.export.graph.write import ExportOptions

export = typer.Typer(help="Export to ONNX, TensorRT, bundles and model repositories.")

Base = Annotated[
    str, typer.Option(help="Base model: a Stable Diffusion folder (diffusers) or hub id.")
]
Adapter = Annotated[Path, typer.Option(help="Adapter file, its folder, or checkpoint-N.")]
Adapters = Annotated[
    list[Path], typer.Option("--adapter", help="Adapter; repeat the option for more adapters.")
]
Out = Annotated[Path, typer.Option(help="New folder to write.")]
Precision = Annotated[
    Literal["float32", "float16", "bfloat16"], typer.Option(help="Precision of the denoiser.")
]
Opset = Annotated[
    int, typer.Option(help="ONNX opset, 18 to 23; 23 keeps attention as one operator.")
]
Size = Annotated[str | None, typer.Option(help="Size in pixels: 512, or 512x768 (HEIGHTxWIDTH).")]
Dynamic = Annotated[bool, typer.Option("--dynamic-size", help="Let the size vary at run time.")]
MaxBatch = Annotated[int, typer.Option(min=1, help="Largest batch of pairs at run time.")]
Batches = Annotated[str, typer.Option(help="Batch sizes used for validation.")]
Operator = Annotated[
    bool, typer.Option("--exchange-operator", help="Keep the exchange as one operator of our own.")
]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Open a .bin file that you trust.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the `dualdiff` command."""
    app.add_typer(export, name="export")


def _require(*packages: str) -> None:
    """Refuse before anything slow when a package is missing. Raises BackendError."""
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BackendError(
                f"{package} is not installed; exporting needs it: pip install "
                "'dualdiff-engine[onnx]'"
            )


def _say(quiet: bool) -> Any:
    return (lambda line: None) if quiet else (lambda line: typer.echo(line))


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text):
        raise SettingsError(f"batch sizes must be numbers such as 1,2,3, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def _options(
    precision: Precision = "float32",
    opset: Opset = 23,
    size: Size = None,
    dynamic_size: Dynamic = False,
    max_batch: MaxBatch = 64,
    batches: Batches = "1,2,3",
    exchange_operator: Operator = False,
) -> ExportOptions:
    """The options of the commands that trace graphs, in the order of their help."""
    _require("onnx", "onnxscript", "onnxruntime")
    from dualdiff_engine.export.graph.write import ExportOptions

    height, width = size_from_text(size) if size else (None, None)
    return ExportOptions(
        precision=precision,
        opset=opset,
        height=height,
        width=width,
        dynamic_size=dynamic_size,
        max_batch=max_batch,
        batches=_numbers(batches),
        exchange_operator=exchange_operator,
    )


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """By name, with annotations that typer can read."""
    # not imported when the command starts, and no option by itself
    hints = get_type_hints(function, localns={"ExportOptions": object}, include_extras=True)
    parameters = inspect.signature(function).parameters
    return {name: p.replace(annotation=hints[name]) for name, p in parameters.items()}


def _with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, which takes the parameters of `_options` in place of its `options`."""
    own, shared = _parameters(command), _parameters(_options)
    place = list(own).index("options")
    del own["options"]
    parameters = list(own.values())
    parameters[place:place] = shared.values()

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = _options(**{name: given.pop(name) for name in shared})
        command(options=options, **given)

    # what typer reads
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


@export.command()
@_with_options
def onnx(
    base: Base,
    adapter: Adapter,
    out: Out,
    options: ExportOptions,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Write text encoder, denoiser and VAE as ONNX, validated against the engine's own networks."""
    from dualdiff_engine.engine import Engine
    from dualdiff_engine.export.graph.write import export_onnx

    say = _say(quiet)
    with Engine.from_pretrained(
        base, adapter=adapter, dtype="float32", device="cpu", allow_pickle=allow_pickle
    ) as engine:
        report = export_onnx(engine, out, options, say)
    say(f"{out}:")
    for line in lines(report):
        say(line)


def lines(report: dict[str, Any]) -> list[str]:
    """A report as a table: the largest error of every graph next to its tolerance."""
    rows = []
    for graph, about in report["graphs"].items():
        for adapter, row in about["adapters"].items():
            worst = max(case["error"] for case in row["cases"])
            rows.append(
                f"{graph:<20} {adapter}: error {worst:.1e} (allowed {row['tolerance']:.1e}, "
                f"{row['tolerance_is']})"
            )
    return rows


@export.command("adapter")
def fold_adapter(
    base: Base,
    adapter: Adapter,
    to: Annotated[Path, typer.Option(help="Export or bundle to add the adapter to.")],
    name: Annotated[
        str | None, typer.Option(help="Name of the adapter (default: its file name).")
    ] = None,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Add another adapter to an export or bundle."""
    _require("onnx", "onnxruntime")
    from dualdiff_engine.export.folder.bundle import add_adapter

    say = _say(quiet)
    report = add_adapter(base, adapter, to, name=name, allow_pickle=allow_pickle, say=say)
    for line in lines(report):
        say(line)


@export.command()
@_with_options
def bundle(
    base: Base,
    adapter: Adapters,
    out: Out,
    options: ExportOptions,
    allow_pickle: AllowPickle = False,
    quiet: Quiet = False,
) -> None:
    """Write one folder for `Engine.from_bundle`: ONNX graphs, adapters, tokenizer, scheduler."""
    from dualdiff_engine.export.folder.bundle import write_bundle

    say = _say(quiet)
    manifest = write_bundle(base, adapter, out, options, allow_pickle=allow_pickle, say=say)
    say(f"{out}: {len(manifest['files'])} files, adapters {', '.join(manifest['adapters'])}")


@export.command()
def tensorrt(
    folder: Annotated[Path, typer.Argument(help="Export or bundle in half precision.")],
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Compute capability such as 8.9, tensorrt-rtx only (default: this GPU's)."
        ),
    ] = None,
    flavour: Annotated[
        Literal["tensorrt", "tensorrt-rtx"] | None,
        typer.Option(help="Default: the one that is installed."),
    ] = None,
    batches: Annotated[
        str, typer.Option(help="Upper ends of the ranges of batch sizes.")
    ] = "1,8,32,64",
    refit: Annotated[
        bool | None, typer.Option(help="Keep the adapter replaceable (default: if there is a GPU).")
    ] = None,
    exchange_plugin: Annotated[
        bool,
        typer.Option(
            "--exchange-plugin",
            help="Run the exchange with our Triton kernel (TensorRT only; needs an "
            "--exchange-operator export).",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Build TensorRT engines of the denoiser graphs, next to them."""
    _require("onnx")
    from dualdiff_engine.export.trt.build import BuildOptions, build

    targets = tuple(target or ())
    options = BuildOptions(flavour or "", targets, _numbers(batches), refit, exchange_plugin)
    say = _say(quiet)
    for built in build(folder, options, say):
        kind = "any adapter" if built.refittable else "one adapter only"
        say(f"{folder / built.file}: {built.attentions} fused attentions, {kind}")


@export.command("triton-server")
def triton_server(
    bundle: Annotated[Path, typer.Argument(help="Bundle to serve.")],
    out: Annotated[Path, typer.Option(help="New model repository to write.")],
    name: Annotated[str, typer.Option(help="Name of the model.")] = "dualdiff",
    device: Annotated[Literal["cpu", "gpu"], typer.Option(help="Device of its instances.")] = "gpu",
    instances: Annotated[int, typer.Option(min=1, help="Instances per device.")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="Largest batch of joined requests.")] = 8,
    delay_us: Annotated[
        int, typer.Option(min=0, help="Microseconds that requests wait to be joined.")
    ] = 0,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Run the bundle's TensorRT engines even if others built them."
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server that serves a bundle."""
    from dualdiff_engine.export.serve.triton_server import Serving, write_repository

    serving = Serving(name, device, instances, max_batch, delay_us, trust)
    write_repository(bundle, out, serving)
    _say(quiet)(f"tritonserver --model-repository {out}")


def verify_bundle(bundle: Path, *, as_json: bool) -> None:
    """Check a bundle's hashes, and that its graphs still compute the same."""
    _require("onnx", "onnxruntime")
    from dualdiff_engine.export.folder.verify import verify_bundle as verified

    report = verified(bundle)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    typer.echo(f"{bundle}: {report['files']} files and {report['engines']} engines unchanged")
    for name, row in report["parity"].items():
        typer.echo(f"{name}: error {row['error']:.1e} (allowed {row['tolerance']:.1e})")
