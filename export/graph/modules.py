"""What is exported: the networks as functions of plain tensors, on the meta device.

Every graph reads and writes fp32 (token ids aside) whatever precision it computes in, so that a
scheduler in fp32 runs around any of them. F branches, R guidance rows, B pairs, h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.model.unet import DualUNet, frequencies
from dualdiff_engine.ops import Ops, bind

META = torch.device("meta")


@dataclass(frozen=True)
class Graph:
    """A module to export and how its inputs may vary.

    inputs: example tensors by name, in the order of `module.forward`. axes: by input, the axes
    that vary and what each counts. strip: prefix of the module's parameter names that the file does
    not keep.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    strip: str = ""


def branch_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    background_kv: Tensor | None = None,
    keep: Tensor | None = None,
) -> Tensor:
    """`reference.branch_linear` as one batched product, and without writing in place.

    What it writes branch by branch would become scatters in a graph.
    """
    weight = weight.transpose(1, 2)
    if input.dim() == 3:
        out = torch.matmul(input, weight)
    else:
        out = torch.matmul(input.flatten(1, -2), weight).unflatten(1, input.shape[1:-1])
    if bias is not None:
        out = out + bias
    if background_kv is None or keep is None:
        return out
    rows, positions, width = background_kv.shape
    first = out[0].unflatten(0, (rows, -1, positions))
    own, joined = first.split([out.shape[-1] - width, width], dim=-1)
    joined = torch.addcmul(background_kv.unsqueeze(1), joined, keep)
    return torch.stack([torch.cat([own, joined], dim=-1).flatten(0, 2), out[1]])


def graph_ops() -> Ops:
    """The reference ops, as a graph wants them."""
    return replace(bind("reference"), branch_linear=branch_linear)


def empty_network(
    config: UNetConfig,
    dtype: torch.dtype,
    background: bool,
    branches: int = 2,
    exchange: Callable[..., Tensor] | None = None,
) -> DualUNet:
    """A network with no values, to trace. exchange: in place of the reference's."""
    ops = graph_ops() if exchange is None else replace(graph_ops(), exchange=exchange)
    unet = DualUNet(config, ops, branches=branches, background=background).to(dtype)
    for name, buffer in unet.named_buffers():
        if name.endswith("gate_bias"):
            # read in fp32 by the exchange: as a constant that needs no cast it stays refittable
            unet.load({name: buffer.float()})
    return unet


class NetworkGraph(nn.Module):
    """A call of the network, timestep included."""

    def __init__(self, unet: DualUNet) -> None:
        super().__init__()
        self.unet = unet
        # in the graph as numbers: an angle is up to a thousand times a frequency, whose last bit
        # every library of exponentials rounds in its own way
        self.frequencies = frequencies(unet.config, "cpu")

    def time_inputs(self, timestep: Tensor) -> Sequence[Tensor]:
        return self.unet.embedded_bias(timestep, self.frequencies.to(timestep.device))[0]


class DenoiserGraph(NetworkGraph):
    """One denoiser call: latents [2, B, 4, h, w], shared by the guidance rows."""

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor, *background: Tensor
    ) -> Tensor:
        """timestep [1], context [2, R, L, X], background per self site [R, S, 2·C] -> noise."""
        unet = self.unet
        text = unet.text_inputs(context.to(unet.conv_in.weight.dtype))
        bias = self.time_inputs(timestep)
        return unet(latents.unsqueeze(1), bias, text, background or None).float()


class BackgroundGraph(NetworkGraph):
    """The background pass: latents [R, 4, h, w], noised to the timestep -> shares per self site."""

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """timestep [1], context [R, L, X] of the image branch -> each [R, S, 2·C].

        Shares stay in the network's precision: only the denoiser reads them.
        """
        unet = self.unet
        text = unet.text_inputs(context[None].to(unet.conv_in.weight.dtype))
        bias = self.time_inputs(timestep)
        return tuple(unet.background_shares(latents, bias, text))


class TextGraph(nn.Module):
    """CLIP's text encoder: input_ids [N, L] int64 -> last hidden state [N, L, X]."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(input_ids)[0].float()


class DecoderGraph(nn.Module):
    """The VAE's decoder: latents [N, 4, h, w], divided by the scaling factor -> [N, 3, H, W]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample.to(self.vae.dtype)).sample.float()


class EncoderGraph(nn.Module):
    """The VAE's encoder: picture [N, 3, H, W] in [-1, 1] -> posterior mean [N, 4, h, w]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.encode(sample.to(self.vae.dtype)).latent_dist.mean.float()


@dataclass(frozen=True)
class Size:
    """Sizes of the graphs' inputs.

    height, width: of latents; dynamic: these are an example, others fit too. tokens: the length to
    which the tokenizer pads a prompt, 77 in every released Stable Diffusion.
    """

    height: int
    width: int
    dynamic: bool = False
    tokens: int = 77

    def axes(self, first: int, of: str = "latent") -> dict[int, str]:
        return {first: f"{of}_height", first + 1: f"{of}_width"} if self.dynamic else {}


def _call_inputs(
    unet: DualUNet, size: Size, latents: tuple[int, ...], rows: tuple[int, ...]
) -> dict[str, Any]:
    """latents, rows: the axes that come before [4, h, w] and before [tokens, width]."""
    shapes = {
        "latents": (*latents, 4, size.height, size.width),
        "timestep": (1,),
        "context": (*rows, size.tokens, unet.config.context_width),
    }
    return {name: torch.empty(shape, device=META) for name, shape in shapes.items()}


def denoiser_graph(unet: DualUNet, size: Size, *, background: bool) -> Graph:
    """Pairs and guidance rows vary."""
    inputs = _call_inputs(unet, size, (2, 3), (2, 2))
    axes: dict[str, dict[int, str]] = {
        "latents": {1: "batch", **size.axes(3)},
        "context": {1: "rows"},
    }
    if background:
        dtype = unet.conv_in.weight.dtype
        for name, shape in share_shapes(unet, size).items():
            inputs[name] = torch.empty(shape, dtype=dtype, device=META)
            axes[name] = {0: "rows", **({1: "positions"} if size.dynamic else {})}
    name = "denoiser_background" if background else "denoiser"
    return Graph(name, DenoiserGraph(unet), inputs, axes, ("noise",), "unet.")


def background_graph(unet: DualUNet, size: Size) -> Graph:
    """unet: of one branch. Guidance rows vary."""
    inputs = _call_inputs(unet, size, (2,), (2,))
    axes = {"latents": {0: "rows", **size.axes(2)}, "context": {0: "rows"}}
    outputs = tuple(share_shapes(unet, size))
    return Graph("background_encoder", BackgroundGraph(unet), inputs, axes, outputs, "unet.")


def share_shapes(unet: DualUNet, size: Size, rows: int = 2) -> dict[str, tuple[int, ...]]:
    """Names and shapes [R, S, 2·C] of the background's shares, one per self site."""
    like = empty_network(unet.config, torch.float32, True, branches=1)
    call = _call_inputs(like, size, (rows,), (rows,))
    shares = BackgroundGraph(like)(**call)
    return {f"background_{index}": tuple(share.shape) for index, share in enumerate(shares)}


def text_graph(encoder: Any, tokens: int) -> Graph:
    inputs = {"input_ids": torch.zeros(4, tokens, dtype=torch.int64)}
    return Graph(
        "text_encoder", TextGraph(encoder), inputs, {"input_ids": {0: "prompts"}},
        ("last_hidden_state",), "encoder.",
    )  # fmt: skip


def decoder_graph(vae: Any, size: Size) -> Graph:
    inputs = {"latent_sample": torch.zeros(2, 4, size.height, size.width)}
    axes = {"latent_sample": {0: "pictures", **size.axes(2)}}
    return Graph("vae_decoder", DecoderGraph(vae), inputs, axes, ("sample",), "vae.")


def encoder_graph(vae: Any, size: Size, pixels: int) -> Graph:
    """pixels: per latent, along one side."""
    inputs = {"sample": torch.zeros(2, 3, pixels * size.height, pixels * size.width)}
    axes = {"sample": {0: "pictures", **size.axes(2, "picture")}}
    return Graph("vae_encoder", EncoderGraph(vae), inputs, axes, ("latent_mean",), "vae.")
