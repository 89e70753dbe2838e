"""Engines around exported networks: what `Engine.from_pretrained(backend="onnxruntime")` builds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dualdiff_engine import adapters
from dualdiff_engine.base_model import BUNDLE, BaseModel
from dualdiff_engine.device import device_of
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder.artefact import Artefact, read_artefacts
from dualdiff_engine.export.folder.bundle import check_files, intact, read_manifest
from dualdiff_engine.export.folder.folded import read_adapters
from dualdiff_engine.export.run.bundle_parts import BundledBase, BundledText, BundledVae
from dualdiff_engine.export.run.denoiser import ExportedDenoiser, OnnxDenoiser
from dualdiff_engine.export.run.onnx_session import onnxruntime, provider_of
from dualdiff_engine.export.trt import api as tensorrt_api
from dualdiff_engine.export.trt import engine_file
from dualdiff_engine.export.trt.build import GRAPHS
from dualdiff_engine.export.trt.runner import TensorrtDenoiser, engine_for
from dualdiff_engine.ops import Choice, Ops, bind
from dualdiff_engine.settings import max_batch_of

logger = logging.getLogger(__name__)


def ops_table(reason: str, backend: str) -> Ops:
    """The ops of an engine whose network runs elsewhere: guidance alone stays PyTorch's."""
    ops = bind("reference")
    rows = [
        row if row.op == "guided_step" else Choice(row.op, backend, reason) for row in ops.table
    ]
    return replace(ops, table=tuple(rows))


def exported_dtype(
    artefacts: Mapping[str, Artefact], asked: str | torch.dtype, folder: Path
) -> torch.dtype:
    """The precision of the graphs. Raises BackendError when another was asked for."""
    precision = next(iter(artefacts.values())).precision
    if str(asked).removeprefix("torch.") not in ("auto", precision):
        raise BackendError(
            f"{folder} was exported in {precision}, asked for {asked}: leave dtype out, or export "
            f"with --precision {str(asked).removeprefix('torch.')}"
        )
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def most_pairs(artefacts: Mapping[str, Artefact], asked: int | None, device: torch.device) -> int:
    """max_batch of an engine. Raises BackendError when more than exported for is asked."""
    limit = min(a.max_batch for name, a in artefacts.items() if name.startswith("denoiser"))
    if asked is not None and asked > limit:
        raise BackendError(
            f"max_batch {asked} is above the {limit} of the export: pass less, or export with "
            f"--max-batch {asked}"
        )
    return asked or min(limit, 32 if device.type == "cuda" else 4)


def check_runtime(backend: str, device: torch.device) -> None:
    """Raises BackendError when what runs the graphs is not there, or not for this device."""
    # text encoder and VAE of a bundle are its own whatever runs the denoiser
    onnxruntime()
    provider_of(device)
    if backend == "tensorrt":
        tensorrt_api.installed()
        if device.type != "cuda":
            raise BackendError(f"TensorRT runs on NVIDIA GPUs, the engine is on {device}")


def fastest(
    folder: Path, artefacts: Mapping[str, Artefact], device: torch.device, trust: bool
) -> tuple[str, str]:
    """(backend, why) of a bundle: TensorRT where engines that may run here lie next to it."""
    if device.type != "cuda":
        return "onnxruntime", ""
    try:
        flavour = tensorrt_api.installed()
        version = str(tensorrt_api.package(flavour).__version__)
        for graph in sorted(artefacts.keys() & set(GRAPHS)):
            engine_file.check_claims(engine_for(folder, graph), flavour, version, trust=trust)
    except BackendError as error:
        return "onnxruntime", f"not TensorRT: {error}"
    return "tensorrt", "engines for this GPU lie next to the graphs"


def denoiser(
    backend: str,
    artefacts: Mapping[str, Artefact],
    folder: Path,
    device: torch.device,
    why: str,
    trust: bool,
) -> ExportedDenoiser:
    """What runs the graphs of a folder; its ops say how and why."""
    if backend == "tensorrt":
        flavour = tensorrt_api.installed()
        ops = ops_table(f"{flavour}: {why}", backend)
        return TensorrtDenoiser(ops, artefacts, folder, device, flavour=flavour, trust=trust)
    ops = ops_table(f"{provider_of(device)[0]}: {why}", backend)
    return OnnxDenoiser(ops, artefacts, folder, device)


@torch.inference_mode()
def from_pretrained(
    base: str | Path,
    exported: str | Path | None,
    backend: str,
    adapter: str | Path | None,
    dtype: str | torch.dtype,
    device: str | torch.device,
    max_batch: int | None,
    allow_pickle: bool,
    revision: str | None,
    local_files_only: bool,
    trust: bool,
) -> Engine:
    """An engine whose denoiser is an exported one; text encoder and VAE stay the base model's.

    exported: a folder by `dualdiff export onnx`. adapter: any that fits, folded at load; by default
    those that were exported.
    Raises what `Engine.from_pretrained` raises.
    """
    if Path(base, BUNDLE).is_file():
        if exported is not None:
            raise BackendError(f"{base} is a bundle: leave exported out")
        named = None if adapter is None else str(adapter)
        chosen = "auto" if backend == "auto" else backend
        return from_bundle(base, named, device, chosen, max_batch, trust)
    if exported is None:
        raise BackendError(
            f"backend {backend!r} runs an exported denoiser: make it with `dualdiff export onnx` "
            "and pass exported=FOLDER"
        )
    folder, target = Path(exported), device_of(device)
    check_runtime(backend, target)
    with intact(folder, "export"):
        artefacts = read_artefacts(folder)
    precision = exported_dtype(artefacts, dtype, folder)
    most = most_pairs(artefacts, max_batch_of(max_batch), target)
    loaded = adapters.load(adapter, allow_pickle=allow_pickle) if adapter else None
    model = BaseModel(base, revision=revision, local_files_only=local_files_only)
    recorded = next(iter(artefacts.values())).base
    if model.sha256 != recorded.sha256:
        raise BackendError(
            f"{folder} was exported from another base model ({recorded.source}, sha256 "
            f"{recorded.sha256[:12]}…) than {base} ({model.sha256[:12]}…): use that one, or export "
            "again"
        )
    graphs = denoiser(backend, artefacts, folder, target, "as asked", trust)
    engine = Engine(model, graphs.ops, target, precision, most, denoiser=graphs)
    if loaded is not None:
        engine.keep_adapter(loaded, adapters.default_name(str(adapter)))
    else:
        with intact(folder, "export"):
            keep_all(engine, folder, artefacts)
    return engine


def keep_all(
    engine: Engine, folder: Path, artefacts: Mapping[str, Artefact], first: str | None = None
) -> None:
    """Keep every adapter next to the graphs; `first`, or the one of the trace, is active."""
    found = read_adapters(folder, artefacts)
    first = first or next(iter(artefacts.values())).adapter.name
    if first not in found:
        raise BackendError(f"{folder} holds no adapter {first!r}; it holds {', '.join(found)}")
    for name in sorted(found, key=lambda name: name == first):
        engine.keep_folded(name, found[name])


@torch.inference_mode()
def from_bundle(
    path: str | Path,
    adapter: str | None,
    device: str | torch.device,
    backend: str,
    max_batch: int | None,
    trust: bool,
) -> Engine:
    """An engine around a bundle alone; see `Engine.from_bundle`."""
    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=False)
    onnxruntime()
    target, why = choose_device(device)
    with intact(folder):
        artefacts = read_artefacts(folder)
    most = most_pairs(artefacts, max_batch_of(max_batch), target)
    if backend not in ("auto", "onnxruntime", "tensorrt"):
        raise BackendError(f"a bundle runs on onnxruntime or tensorrt, not on {backend!r}")
    if backend == "auto":
        backend, reason = fastest(folder, artefacts, target, trust)
        why = f"{why}; {reason}" if reason else why
    check_runtime(backend, target)
    with intact(folder):
        graphs = denoiser(backend, artefacts, folder, target, why, trust)
        engine = _around(graphs, BundledBase(folder, artefacts), most)
        keep_all(engine, folder, artefacts, adapter or manifest["first"])
    logger.info("%s runs by %s", folder, graphs.ops.table[0].reason)
    return engine


def _around(graphs: ExportedDenoiser, base: BundledBase, most: int) -> Engine:
    """An engine whose every network is a bundle's."""
    artefacts, folder, device = graphs.artefacts, graphs.folder, graphs.device
    for needed in ("text_encoder", "vae_decoder"):
        if needed not in artefacts:
            raise BackendError(f"{folder} has no {needed}.onnx: copy the whole bundle again")
    text = BundledText(
        base.load_tokenizer(),
        folder / "text_encoder.onnx",
        artefacts["text_encoder"],
        base.unet_config.context_width,
        device,
    )
    # what is asked of the base while pairs are drawn is asked once here, so that it fails here
    base.make_scheduler(None)
    return Engine(
        base,
        graphs.ops,
        device,
        exported_dtype(artefacts, "auto", folder),
        most,
        denoiser=graphs,
        text_encoder=text,
        vae=BundledVae(folder, artefacts, base.pixels_per_latent, device),
    )


def choose_device(asked: str | torch.device) -> tuple[torch.device, str]:
    """Where a bundle runs, and why there. Raises SettingsError, BackendError."""
    if str(asked) != "auto":
        device = device_of(asked)
        provider_of(device)
        return device, "as asked"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "there is no GPU that PyTorch sees"
    offered = onnxruntime().get_available_providers()
    if "CUDAExecutionProvider" not in offered:
        raise BackendError(
            "there is a GPU, but this ONNX Runtime cannot use it: install "
            "'dualdiff-engine[ort-gpu]' in place of onnxruntime, or pass device='cpu'"
        )
    return torch.device("cuda"), "a GPU, and ONNX Runtime with CUDA"
