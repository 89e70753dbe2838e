"""The peers of a benchmark: each predicts the guided noise of a whole batch, its own way."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dualdiff_engine import engine
from dualdiff_engine.adapters import fold
from dualdiff_engine.bench.step import exported
from dualdiff_engine.bench.step.case import (
    Case,
    RandomWeights,
    adapter_of,
    adapter_on,
    base_weights,
    diffusers_unet,
    network_config,
)
from dualdiff_engine.bench.step.ported import PortedUNet, merged, sdpa
from dualdiff_engine.bench.step.released import ReleasedUNet
from dualdiff_engine.errors import BackendError
from dualdiff_engine.model import doubling
from dualdiff_engine.model.call import Denoiser
from dualdiff_engine.model.cuda_graph import GraphedDenoiser
from dualdiff_engine.model.unet import DualUNet
from dualdiff_engine.ops import BACKENDS, COUPLED, NAMES, Ops, bind, triton, xformers

META = torch.device("meta")


class Peer(Protocol):
    """Built from a case; `step` is what is timed."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None: ...

    def step(self, index: int) -> Tensor:
        """Guided noise [B, 2, 4, h, w] fp32 at the index-th timestep."""
        ...


def noised(case: Case, inputs: dict[str, Tensor], index: int) -> Tensor:
    """DDPM's add_noise on SD's scaled-linear schedule; the same draw in every step."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = (1 - betas).cumprod(0)[int(case.timesteps[index])]
    return alpha.sqrt() * inputs["background"] + (1 - alpha).sqrt() * inputs["noise"]


# peers of one process share what they only read
@functools.lru_cache(maxsize=2)
def base_tensors(
    model: str, seed: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    base = base_weights(model, seed)
    return {name: x.to(device, dtype) for name, x in all_at_once(base, device).items()}


def all_at_once(base: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
    """On a GPU's host, which has memory to spare, weights are drawn together."""
    return base.drawn() if isinstance(base, RandomWeights) and device.type == "cuda" else base


@functools.lru_cache(maxsize=2)
def folded_tensors(
    model: str, seed: int, background: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    adapter = adapter_of(model, seed, background=background)
    base = all_at_once(base_weights(model, seed), device)
    network = fold.fold_network(base, device, dtype)
    return network | fold.fold_sites(base, adapter.sites, device, dtype)


def filled_unet(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    unet = diffusers_unet(case.model)
    if device != META:
        tensors = base_tensors(case.model, case.seed, device, dtype)
        unet.load_state_dict(tensors, assign=True)
    return unet


class Released:
    """The released computation, one pair per call, in fp32 whatever the others use."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.inputs = case, case.inputs(device)
        adapter = adapter_of(case.model, case.seed, background=case.background)
        self.unet = ReleasedUNet(
            filled_unet(case, device, torch.float32), adapter_on(adapter, device)
        )
        # [2 branches, 2 rows] -> rows, branches: branch fastest
        self.context = self.inputs["context"].transpose(0, 1).flatten(0, 1)
        self.timesteps = case.timesteps.to(device)

    def step(self, index: int) -> Tensor:
        case, timestep = self.case, self.timesteps[index]
        guided = []
        for pair in self.inputs["latents"]:
            if case.background:
                latents = noised(case, self.inputs, index)
                self.unet.background_pass(latents, timestep, self.context[0::2])
            noise = self.unet(torch.cat([pair, pair]), timestep, self.context)
            uncond, cond = noise.chunk(2)
            guided.append(uncond + case.guidance * (cond - uncond))
        return torch.stack(guided)


class Diffusers:
    """The same UNet by diffusers, uncoupled, all rows in one batch: what two branches must cost."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.inputs, self.dtype = case, case.inputs(device), dtype
        self.unet = filled_unet(case, device, dtype)
        rows = self.inputs["context"].transpose(0, 1)[:, None]
        self.context = rows.expand(2, case.batch, 2, -1, -1).flatten(0, 2).to(dtype)
        self.timesteps = case.timesteps.to(device)

    def step(self, index: int) -> Tensor:
        latents = self.inputs["latents"].flatten(0, 1).to(self.dtype)
        noise = self.unet(torch.cat([latents, latents]), self.timesteps[index], self.context).sample
        uncond, cond = noise.float().unflatten(0, (2, self.case.batch, 2))
        return uncond + self.case.guidance * (cond - uncond)


class Eager:
    """A careful port to diffusers in plain PyTorch: SDPA, LoRA merged, all pairs in one batch."""

    attend = staticmethod(sdpa)

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.inputs = case.inputs(device)
        unet = filled_unet(case, device, dtype)
        adapter = adapter_on(adapter_of(case.model, case.seed, background=case.background), device)
        weights = merged(base_weights(case.model, case.seed), adapter, unet.conv_in.weight)
        self.unet = PortedUNet(unet, adapter_on(adapter, dtype), weights, self.attend)
        # a prompt for every row: [2 branches, 2 rows, B] flat
        context = self.inputs["context"].to(dtype)
        self.one_pair = context
        self.context = context[:, :, None].expand(-1, -1, case.batch, -1, -1).flatten(0, 2)
        self.timesteps = case.timesteps.to(device)

    def step(self, index: int) -> Tensor:
        case, timestep = self.case, self.timesteps[index]
        if case.background:
            latents = noised(case, self.inputs, index).to(self.dtype)
            self.unet.background_pass(latents, timestep, self.one_pair[0])
        latents = self.inputs["latents"].transpose(0, 1)[:, None].expand(-1, 2, *[-1] * 4)
        noise = self.unet(latents.flatten(0, 2).to(self.dtype), timestep, self.context)
        uncond, cond = noise.float().unflatten(0, (2, 2, case.batch)).unbind(1)
        return (uncond + case.guidance * (cond - uncond)).transpose(0, 1)


class Compiled(Eager):
    """As `eager`, channels-last and through torch.compile, on a GPU."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(case, device, dtype)
        if device != META:
            # graphs of torch.compile overwrite what the background pass leaves behind
            mode = "max-autotune-no-cudagraphs" if case.background else "max-autotune"
            unet = self.unet.unet.to(memory_format=torch.channels_last)
            self.unet.unet = torch.compile(unet, mode=mode)


class Xformers(Eager):
    """As `eager`, with attention by xformers."""

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.device == META:
            return sdpa(query, key, value)
        return xformers.memory_efficient(query, key, value)


class EnginePeer:
    """The engine's network and ops; with a background, its shares kept as `noise="fixed"` does."""

    backend = "auto"
    # the one op that has its best kernel, for a ladder; None: every op
    only: str | None = None
    graphed = False

    def __init__(
        self, case: Case, device: torch.device, dtype: torch.dtype, folds: bool | None = None
    ) -> None:
        """folds: whether doublings are folded, by default as an engine there decides."""
        self.case, self.inputs = case, case.inputs(device)
        counted = device == META
        self.ops = bind("reference") if counted else self.bound(device, dtype)
        unet = DualUNet(network_config(case.model), self.ops, background=case.background)
        if not counted:
            unet.load(folded_tensors(case.model, case.seed, case.background, device, dtype))
        if doubling.fits(device, dtype) if folds is None else folds:
            unet.fold_doublings()
        self.time_bias = unet.time_inputs(case.timesteps.to(device))
        self.text = unet.text_inputs(self.inputs["context"].to(dtype))
        self.unet: Denoiser = GraphedDenoiser(unet) if self.graphed and not counted else unet
        self.kept: dict[int, Sequence[Tensor]] = {}

    @classmethod
    def bound(cls, device: torch.device, dtype: torch.dtype) -> Ops:
        if cls.only is None:
            return bind(cls.backend, device=device, dtype=dtype)
        # without its own kernels the engine has PyTorch's, on a CPU with oneDNN's products
        kernels = device.type == "cuda" or triton.interpreted()
        plain = bind("reference" if kernels else "onednn", device=device, dtype=dtype)
        best = bind("triton" if kernels else "auto", device=device, dtype=dtype)
        (row,) = (row for row in best.table if row.op == cls.only)
        table = tuple(row if other.op == row.op else other for other in plain.table)
        return replace(plain, **{row.op: getattr(best, row.op)}, table=table)

    def background(self, index: int) -> Sequence[Tensor]:
        latents = noised(self.case, self.inputs, index)
        return self.unet.background_shares(latents, self.time_bias[index], self.text)

    def step(self, index: int) -> Tensor:
        shares = None
        if self.case.background:
            if index not in self.kept:
                self.kept[index] = self.background(index)
            shares = self.kept[index]
        latents = self.inputs["latents"].transpose(0, 1).unsqueeze(1)
        noise = self.unet(latents, self.time_bias[index], self.text, shares)
        return self.ops.guided_step(noise, self.case.guidance).transpose(0, 1)


class EngineFresh(EnginePeer):
    """As `engine`, with a background pass in every step, as `noise="fresh"` does."""

    def step(self, index: int) -> Tensor:
        self.kept.clear()
        return super().step(index)


class Exported(EnginePeer):
    """The engine as users get it around exported graphs, of a folder by `exported.prepare`."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        dtype: torch.dtype,
        folder: Path | None = None,
    ) -> None:
        if device == META:
            # what is counted is the network that was exported
            super().__init__(case, device, dtype)
            return
        assert folder is not None
        self.case, self.inputs = case, case.inputs(device)
        self.engine = engine.Engine.from_pretrained(
            folder / exported.BASE,
            backend=self.backend,
            exported=folder / exported.GRAPHS,
            device=device,
            dtype=dtype,
            max_batch=case.batch,
        )
        self.ops, self.unet = self.engine.ops, self.engine.denoiser
        self.time_bias = self.unet.time_inputs(case.timesteps.to(device))
        self.text = self.unet.text_inputs(self.inputs["context"])
        self.kept = {}

    @classmethod
    def refused(cls, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run, in a line."""
        for package in ("onnx", "onnxscript"):
            if importlib.util.find_spec(package) is None:
                return f"it exports, which needs {package}: pip install 'dualdiff-engine[onnx]'"
        from dualdiff_engine.export.run import engine as exported_engine

        try:
            exported_engine.check_runtime(cls.backend, device)
        except BackendError as error:
            return str(error)
        if cls.backend == "tensorrt" and dtype == torch.float32:
            return "TensorRT has no fused attention in float32: use bfloat16 or float16"
        if cls.backend == "onnxruntime" and device.type == "cpu" and dtype == torch.bfloat16:
            return "ONNX Runtime has no products in bfloat16 on a CPU: use float32"
        return None


def variant(**settings: Any) -> type[EnginePeer]:
    """The engine with something switched: backend, only, graphed."""
    return type("EngineVariant", (EnginePeer,), settings)


def exported_to(backend: str) -> type[Exported]:
    return type("ExportedVariant", (Exported,), {"backend": backend})


PEERS: dict[str, type[Peer]] = {
    "released": Released,
    "diffusers": Diffusers,
    "eager": Eager,
    "compiled": Compiled,
    "xformers": Xformers,
    "engine": EnginePeer,
    "engine-fresh": EngineFresh,
    "engine-graph": variant(graphed=True),
    **{f"engine-{name}": variant(backend=name) for name in BACKENDS},
    # from plain PyTorch to everything at once, one op of the released coupling at a time
    **{f"engine-only-{op}": variant(only=op) for op in NAMES if op not in COUPLED},
    "engine-triton-graph": variant(backend="triton", graphed=True),
    "engine-onnxruntime": exported_to("onnxruntime"),
    "engine-tensorrt": exported_to("tensorrt"),
}


def folds(peer: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a peer's network runs with folded doublings; exported graphs have none."""
    built = PEERS[peer]
    ours = issubclass(built, EnginePeer) and not issubclass(built, Exported)
    return ours and doubling.fits(device, dtype)


def require(peer: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise BackendError with the reason, in a line, when a peer cannot run here."""
    reason = None
    built = PEERS[peer]
    if not issubclass(built, EnginePeer) and importlib.util.find_spec("diffusers") is None:
        reason = "it needs diffusers: pip install diffusers"
    elif (built is Compiled or getattr(built, "graphed", False)) and device.type != "cuda":
        reason = f"it is for NVIDIA GPUs, the benchmark is on {device.type}"
    elif built is Xformers:
        ok, why = xformers.supported("attention", device, dtype)
        reason = None if ok else why
    elif issubclass(built, Exported):
        reason = built.refused(device, dtype)
    elif issubclass(built, EnginePeer):
        try:
            built.bound(device, dtype)
        except BackendError as error:
            reason = str(error)
    if reason:
        raise BackendError(f"peer {peer!r} cannot run here: {reason}")
