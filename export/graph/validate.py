"""Exported graphs against the eager network, on random inputs, by ONNX Runtime on the CPU."""

from __future__ import annotations

import copy
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError
from dualdiff_engine.export.folder.artefact import ADAPTERS, Artefact
from dualdiff_engine.export.folder.folded import PROBE, read_adapter
from dualdiff_engine.export.graph import probe
from dualdiff_engine.export.graph.probe import relative
from dualdiff_engine.export.graph.progress import Say, part
from dualdiff_engine.export.graph.widen import cpu_session
from dualdiff_engine.export.run.denoiser import initializers
from dualdiff_engine.export.run.onnx_session import onnxruntime
from dualdiff_engine.files import sha256_of
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import bind

REPORT = "report.json"
# relative L2 error in fp32: the rounding of some sixty layers, by two orders of summation
FP32 = 5e-6
# of decoded pictures and latents: a hundredth of what half an 8-bit level is
PICTURE = 2e-5
# what rounding one number to fp32 may cost
UNIT = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class CheckedCall:
    """Inputs of a graph, what the engine's own network makes of them, and what they are."""

    about: dict[str, int]
    inputs: dict[str, Tensor]
    expected: list[Tensor]


@torch.inference_mode()
def validate(
    engine: Engine, folder: Path, file: str, batches: Sequence[int], fresh: set[str], say: Say
) -> dict[str, Any]:
    """Run the graphs that the engine's active adapter uses against the engine; returns the report.

    file: the adapter's stem in the folder. fresh: graphs that were traced with this adapter; others
    get its tensors in place of their own. Report and probe are written next to the graphs.
    Raises BackendError when a graph misses its tolerance.
    """
    report = read_report(folder)
    report["runtime"] = f"onnxruntime {onnxruntime().__version__}, CPU"
    background = bool(engine.active.summary.background)
    other = "denoiser" if background else "denoiser_background"
    adapter = folder / ADAPTERS / f"{file}.safetensors"
    read = {path.stem: Artefact.read(path) for path in sorted(folder.glob("*.onnx"))}
    graphs = {name: artefact for name, (artefact, _) in read.items()}
    for name, (artefact, model) in read.items():
        if (name not in fresh and not artefact.adapter_weights) or name == other:
            continue
        path, changed = folder / f"{name}.onnx", {}
        if name not in fresh:
            _, folded = read_adapter(adapter, graphs)
            changed = initializers({**folded.sites, **folded.text}, artefact)
        with part(say, f"validating {name}"):
            row = _validate_graph(engine, path, artefact, batches, changed)
        about = report.setdefault("graphs", {}).setdefault(artefact.graph, {})
        kinds = Counter(node.op_type for node in model.graph.node)
        about |= {
            "sha256": sha256_of(path),
            "nodes": kinds.total(),
            "attentions": kinds["Attention"],
        }
        about.setdefault("adapters", {})[file] = row
        report["artefact"] = _shared(artefact)
        worst = max(case["error"] for case in row["cases"])
        if not worst <= row["tolerance"]:
            raise BackendError(
                f"{artefact.graph}: relative error {worst:.1e} against the engine's own network, "
                f"above the tolerance {row['tolerance']:.1e}: the export was not kept; please "
                "report this"
            )
    probe_file = adapter.with_name(file + PROBE)
    with part(say, "writing the probe, and running it", probe_file):
        probe.write(engine, probe_file, graphs)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        found = probe.check(folder, file, graphs, report)
    for name, row in found.items():
        if not row["error"] <= row["tolerance"]:
            raise BackendError(
                f"{name}: with the base model's own prompts and size its relative error is "
                f"{row['error']:.1e}, above the tolerance {row['tolerance']:.1e}: the export was "
                "not kept; please report this"
            )
    return report


def read_report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def _shared(artefact: Artefact) -> dict[str, Any]:
    """The metadata that all graphs of an export share."""
    metadata = asdict(artefact)
    own = ("graph", "layout", "transposed", "adapter_weights", "adapter")
    return {name: metadata[name] for name in metadata if name not in own}


def _validate_graph(
    engine: Engine,
    path: Path,
    artefact: Artefact,
    batches: Sequence[int],
    changed: Mapping[str, Tensor],
) -> dict[str, Any]:
    start = time.perf_counter()
    session = cpu_session(path, artefact, changed)
    loaded = time.perf_counter() - start
    cases, seconds = [], 0.0
    for case in _cases(engine, engine.unet, artefact, batches):
        start = time.perf_counter()
        outputs = session(**case.inputs)
        seconds += time.perf_counter() - start
        pairs = list(zip(outputs, case.expected, strict=True))
        largest = max(float((a.float() - e.float()).abs().max()) for a, e in pairs)
        error = _error(outputs, case.expected)
        cases.append({**case.about, "error": error, "largest_difference": largest})
    worst = max(case["error"] for case in cases)
    tolerance, why = _tolerance(engine, artefact, batches, worst)
    return {
        "cases": cases,
        "tolerance": tolerance,
        "tolerance_is": why,
        "load_seconds": round(loaded, 2),
        "run_seconds": round(seconds, 2),
    }


def _error(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(relative(a, e) for a, e in zip(outputs, expected, strict=True))


def _cases(
    engine: Engine, unet: DualUNet, artefact: Artefact, batches: Sequence[int]
) -> Iterator[CheckedCall]:
    """The same inputs whatever network says what is expected."""
    if artefact.graph in _NETWORK:
        tokens = engine.text_encoder.tokenizer.model_max_length
        return _NETWORK[artefact.graph](unet, artefact, batches, tokens)
    return _OTHERS[artefact.graph](engine, artefact, batches)


def _tolerance(
    engine: Engine, artefact: Artefact, batches: Sequence[int], worst: float
) -> tuple[float, str]:
    """How far a graph may be from the engine's network in float32, and why.

    In half precision: as far as eager PyTorch is, on the same inputs. It is run in bfloat16, which
    CPUs have; float16 keeps three more bits. worst: how far it is; float64 is asked only where
    float32's usual rounding does not explain it.
    """
    if artefact.graph.startswith("vae"):
        # A runtime may add the K squares of a norm's group in turn. Partial sums grow evenly, each
        # is rounded with a variance of u²/3: together a deviation of u sqrt(K) / 3, of whose root
        # half is left. Norms err independently, so their K add up; twice the deviation is allowed.
        in_turn = UNIT * math.sqrt(max(_normed(engine.vae, artefact))) / 3
        return max(PICTURE, in_turn), "fp32 rounding of pictures, group norms summed in turn"
    if artefact.graph not in _NETWORK or artefact.precision == "float32":
        usual = FP32, "fp32 rounding, in two orders of summation"
        if worst <= FP32 or artefact.graph not in _NETWORK:
            return usual
        # Graph and network err independently, so their errors' squares add up. An adapter that
        # amplifies rounding does so in few directions: one error is distributed as a normal
        # number, of which one in 16,000 is beyond four deviations.
        amplified = 4 * math.sqrt(2) * _fp32_deviation(engine, artefact, batches)
        return max(usual, (amplified, "what this adapter makes of fp32 rounding, against fp64"))
    dtype = torch.bfloat16
    eager = _eager(engine, "auto", dtype)
    exact = _cases(engine, engine.unet, artefact, batches)
    half = _cases(engine, eager, artefact, batches)
    lost = max(_error(h.expected, e.expected) for h, e in zip(half, exact, strict=True))
    finer = torch.finfo(getattr(torch, artefact.precision)).eps / torch.finfo(dtype).eps
    rounding = torch.finfo(getattr(torch, artefact.precision)).eps / 2
    return lost * finer + rounding, f"what eager PyTorch loses in {artefact.precision}"


def _eager(engine: Engine, backend: str, dtype: torch.dtype) -> DualUNet:
    """The engine's network with its active adapter, in another precision or by other ops."""
    network = DualUNet(engine.base.unet_config, bind(backend, dtype=dtype), background=True)
    tensors = engine.unet.state_dict().items()
    network.load({name: t.to(dtype) for name, t in tensors if not t.is_meta})
    return network


def _fp32_deviation(engine: Engine, artefact: Artefact, batches: Sequence[int]) -> float:
    """Root mean square of eager PyTorch's relative errors in float32, against float64.

    On the inputs of the validation, by two orders of summation: the engine's and the reference's.
    """
    exact = _cases(engine, _eager(engine, "reference", torch.float64), artefact, batches)
    eager = (engine.unet, _eager(engine, "reference", torch.float32))
    ways = zip(*(_cases(engine, network, artefact, batches) for network in eager), strict=True)
    squares = [
        _error(case.expected, truth.expected) ** 2
        for truth, cases in zip(exact, ways, strict=True)
        for case in cases
    ]
    return math.sqrt(sum(squares) / len(squares))


def _normed(vae: Any, artefact: Artefact) -> list[float]:
    """For every size, the numbers in a group of each of the VAE's norms that run, together."""
    shadow, found = copy.deepcopy(vae).to("meta"), 0.0

    def count(norm: torch.nn.GroupNorm, given: tuple[Tensor, ...]) -> None:
        nonlocal found
        found += given[0][0].numel() / norm.num_groups

    for module in shadow.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_pre_hook(count)
    totals = []
    for height, width in _sizes(artefact):
        found = 0.0
        if artefact.graph == "vae_decoder":
            shadow.decode(torch.empty(1, 4, height, width, device="meta"))
        else:
            scale = 2 ** (len(shadow.config.block_out_channels) - 1)
            shadow.encode(torch.empty(1, 3, scale * height, scale * width, device="meta"))
        totals.append(found)
    return totals


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sizes(artefact: Artefact) -> list[tuple[int, int]]:
    """The latent size, and another where any may come."""
    size = (artefact.height, artefact.width)
    # odd ones: every level rounds differently
    return [size, (size[0] + 3, size[1] - 5)] if artefact.dynamic_size else [size]


def _call(unet: DualUNet, rows: int, tokens: int, draw: torch.Generator) -> dict[str, Any]:
    """Inputs that both graphs of the network take, and what the network makes of them."""
    width = unet.config.context_width
    timestep = torch.randint(0, 1000, (1,), generator=draw).float()
    context = torch.randn(2, rows, tokens, width, generator=draw)
    return {
        "timestep": timestep,
        "context": context,
        "bias": unet.time_inputs(timestep)[0],
        "text": unet.text_inputs(context.to(unet.conv_in.weight.dtype)),
    }


def _denoiser_cases(
    unet: DualUNet, artefact: Artefact, batches: Sequence[int], tokens: int
) -> Iterator[CheckedCall]:
    """Every batch with guidance, the first without."""
    dtype = getattr(torch, artefact.precision)
    wanted = [(batch, 2, size) for size in _sizes(artefact) for batch in batches]
    for seed, (batch, rows, size) in enumerate([*wanted, (batches[0], 1, wanted[0][2])]):
        draw = _draw(seed)
        call = _call(unet, rows, tokens, draw)
        latents = torch.randn(2, batch, 4, *size, generator=draw)
        inputs = {"latents": latents, "timestep": call["timestep"], "context": call["context"]}
        shares = None
        if artefact.graph == "denoiser_background":
            noised = torch.randn(rows, 4, *size, generator=draw)
            shares = unet.background_shares(noised, call["bias"], call["text"])
            inputs |= {f"background_{i}": share.to(dtype) for i, share in enumerate(shares)}
        noise = unet(latents.unsqueeze(1), call["bias"], call["text"], shares)
        yield CheckedCall(_about(size, batch=batch, rows=rows), inputs, [noise])


def _background_cases(
    unet: DualUNet, artefact: Artefact, _: Sequence[int], tokens: int
) -> Iterator[CheckedCall]:
    for seed, (rows, size) in enumerate((r, s) for s in _sizes(artefact) for r in (2, 1)):
        draw = _draw(seed)
        call = _call(unet, rows, tokens, draw)
        latents = torch.randn(rows, 4, *size, generator=draw)
        shares = unet.background_shares(latents, call["bias"], call["text"])
        inputs = {"latents": latents, "timestep": call["timestep"], "context": call["context"][0]}
        yield CheckedCall(_about(size, rows=rows), inputs, shares)


def _text_cases(engine: Engine, _: Artefact, batches: Sequence[int]) -> Iterator[CheckedCall]:
    text = engine.text_encoder
    shape = (text.tokenizer.model_max_length,)
    for seed, prompts in enumerate(batches):
        ids = torch.randint(0, len(text.tokenizer), (prompts, *shape), generator=_draw(seed))
        hidden = torch.func.functional_call(text.encoder, dict(engine.active.text), (ids,))[0]
        yield CheckedCall({"prompts": prompts}, {"input_ids": ids}, [hidden])


def _decoder_cases(engine: Engine, artefact: Artefact, _: Sequence[int]) -> Iterator[CheckedCall]:
    for seed, (pictures, size) in enumerate((n, s) for s in _sizes(artefact) for n in (1, 2)):
        latents = torch.randn(pictures, 4, *size, generator=_draw(seed))
        expected = engine.vae.decode(latents).sample
        yield CheckedCall(_about(size, pictures=pictures), {"latent_sample": latents}, [expected])


def _encoder_cases(engine: Engine, artefact: Artefact, _: Sequence[int]) -> Iterator[CheckedCall]:
    scale = engine.base.pixels_per_latent
    for seed, (pictures, size) in enumerate((n, s) for s in _sizes(artefact) for n in (1, 2)):
        shape = (pictures, 3, *(scale * side for side in size))
        picture = torch.rand(shape, generator=_draw(seed)) * 2 - 1
        expected = engine.vae.encode(picture).latent_dist.mean
        yield CheckedCall(_about(size, pictures=pictures), {"sample": picture}, [expected])


def _about(size: tuple[int, int], **counts: int) -> dict[str, int]:
    return {**counts, "height": size[0], "width": size[1]}


_NETWORK: dict[str, Callable[[DualUNet, Artefact, Sequence[int], int], Iterator[CheckedCall]]] = {
    "denoiser": _denoiser_cases,
    "denoiser_background": _denoiser_cases,
    "background_encoder": _background_cases,
}
_OTHERS: dict[str, Callable[[Engine, Artefact, Sequence[int]], Iterator[CheckedCall]]] = {
    "text_encoder": _text_cases,
    "vae_decoder": _decoder_cases,
    "vae_encoder": _encoder_cases,
}
