"""The trainable network: a frozen Stable Diffusion UNet with a trainable site per attention layer.

Trained parameters go by the names of released adapters, so that saving is writing them down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dualdiff_engine import adapters
from dualdiff_engine.adapters.format import PROJECTIONS, Adapter, LowRank
from dualdiff_engine.base_model import BaseModel
from dualdiff_engine.errors import AdapterError
from dualdiff_engine.model.coupling import ALIGN, CONNECT, Coupling, blocks_of
from dualdiff_engine.pipeline.text import TextEncoder
from dualdiff_engine.settings import BRANCHES
from dualdiff_engine.training.options import TrainingOptions
from dualdiff_engine.training.site import TrainableSite


class TrainableNetwork:
    """UNet and text encoder of a base model, frozen, and the parameters of an adapter.

    parameters: by name in the adapter file, fp32. The frozen weights are in `dtype`.
    """

    def __init__(
        self, base: BaseModel, options: TrainingOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype, self.background = device, dtype, options.background
        self.unet = base.load_unet(device, dtype)
        if options.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        generator = torch.Generator().manual_seed(options.seed)
        self.coupling, self.sites = _sites(self.unet, options)
        for site in self.sites.values():
            site.to_empty(device="cpu")
            site.initialise(generator)
            site.to(device)
        self.unet.set_attn_processor({f"{n}.processor": site for n, site in self.sites.items()})
        self.parameters: dict[str, nn.Parameter] = {
            f"{self._prefix(name)}.{part}": parameter
            for name, site in self.sites.items()
            for part, parameter in site.named_parameters()
        }
        # of an adapter that training started at, what is not trained
        self._kept: dict[str, Tensor] = {}
        tokenizer, encoder = base.load_text()
        self.text = TextEncoder(tokenizer, encoder.to(device))
        self._text_lora = (
            self._add_text_lora(options.rank, generator) if options.text_encoder else {}
        )

    def _prefix(self, site: str) -> str:
        chained = self.background and site.endswith("attn1")
        return f"unet.{site}.processor" + (".chained_proc" if chained else "")

    def _add_text_lora(
        self, rank: int, generator: torch.Generator
    ) -> dict[str, dict[str, LowRank]]:
        lora: dict[str, dict[str, LowRank]] = {}
        for layer, width in self.text.layers.items():
            lora[layer] = {}
            for part in PROJECTIONS:
                drawn = torch.randn(rank, width, generator=generator) / rank
                down = nn.Parameter(drawn.to(self.device))
                up = nn.Parameter(torch.zeros(width, rank, device=self.device))
                prefix = f"text_encoder.{layer}.to_{part}_lora"
                self.parameters |= {f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}
                lora[layer][part] = LowRank(down, up)
        return lora

    @property
    def trains_text(self) -> bool:
        return bool(self._text_lora)

    def encode(self, prompts: list[str]) -> Tensor:
        """[len(prompts), L, X] fp32, with the text encoder's LoRA if it is trained."""
        return self.text.encode(self.text.tokenize(prompts), self.text.fold(self._text_lora))

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        background: Tensor | None = None,
        placeholder: Tensor | None = None,
    ) -> Tensor:
        """Predict the noise, with gradients.

        latents [2 branches, B, 4, h, w]; timesteps [B]; context [2, B or 1, L, X]; background
        [B, 4, h, w], noised to the timesteps; placeholder [2, B or 1, L], as `TextEncoder.places`
        finds it, for couplings that align -> [2, B, 4, h, w] in the network's dtype.
        """
        assert (background is not None) == self.background
        for site in self.sites.values():
            site.placeholder = placeholder
        strands = (
            [latents[0], latents[1]] if background is None else [latents[0], background, latents[1]]
        )
        rows = torch.cat(strands).to(self.dtype).contiguous(memory_format=torch.channels_last)
        noise = self.unet(
            rows, timesteps.repeat(len(strands)), context.flatten(0, 1).to(self.dtype)
        ).sample
        noise = noise.unflatten(0, (len(strands), -1))
        return torch.stack([noise[0], noise[-1]])

    def places(self, prompts: list[str]) -> Tensor | None:
        """Of the placeholder in prompts [n, L], where the coupling needs them."""
        if self.coupling is None or not self.coupling.aligns:
            return None
        return self.text.places(self.text.tokenize(prompts), self.coupling.placeholder)

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The adapter, as released adapters name it, on the CPU."""
        tensors = {**self._kept, **self.parameters}
        return {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}

    def start_at(self, adapter: Adapter) -> None:
        """Start at a trained adapter; its text encoder's LoRA is kept as it is."""
        tensors = adapters.named(adapter)
        self._kept = {n: t for n, t in tensors.items() if n.startswith("text_encoder.")}
        self.load({name: t for name, t in tensors.items() if name not in self._kept})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the parameters of an adapter trained with the same options. Raises AdapterError."""
        if set(tensors) != set(self.parameters):
            odd = sorted(set(tensors) ^ set(self.parameters))[0]
            raise AdapterError(
                f"{odd}: the adapter was trained with other options; pass the same options"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])


def _sites(unet: Any, options: TrainingOptions) -> tuple[Coupling | None, dict[str, TrainableSite]]:
    """The coupling of the base's blocks, and empty sites by module path."""
    strands = len(BRANCHES) + options.background
    names = blocks_of(name.removesuffix(".processor") for name in unet.attn_processors)
    coupling = options.coupling(len(names))
    blocks = (coupling or Coupling.released(len(names))).blocks
    coupled = dict(zip(names, blocks, strict=True))
    sites = {}
    for processor in unet.attn_processors:
        name = processor.removesuffix(".processor")
        attn = unet.get_submodule(name)
        block, of_self = coupled[name.rpartition(".")[0]], name.endswith("attn1")
        blend = options.blend_width if options.background and of_self else 0
        with torch.device("meta"):
            sites[name] = TrainableSite(
                attn.to_q.weight.shape[0],
                attn.to_k.weight.shape[1],
                options.rank,
                strands,
                blend,
                block.exchange if of_self else block.text_exchange,
                connects=of_self and block.attention == CONNECT,
                aligns=not of_self and block.text == ALIGN,
            )
    return coupling, sites
