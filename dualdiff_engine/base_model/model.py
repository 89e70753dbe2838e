"""`BaseModel`: the parts of a diffusers Stable Diffusion folder, each read as late as possible.

Text encoder, VAE, tokenizer and scheduler are transformers' and diffusers'. The UNet's tensors stay
in their file until the weights module asks for one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.base_model import configs
from dualdiff_engine.base_model.folder import (
    AGAIN,
    PARTS,
    STEMS,
    blamed_on,
    check_files,
    check_index,
    find,
    read_json,
    weights_file,
)
from dualdiff_engine.base_model.identity import identity, tokenizer_values
from dualdiff_engine.base_model.schedulers import Schedulers
from dualdiff_engine.base_model.tensors import TensorFile
from dualdiff_engine.errors import BaseModelError
from dualdiff_engine.model.config import UNetConfig

# of CLIP, before and behind a prompt
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# names that diffusers gave the VAE's attention until 0.14
_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class BaseModel:
    """A Stable Diffusion model in diffusers format.

    Args:
        source: a folder or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        revision: branch, tag or commit on the hub.
        local_files_only: never use the network; take what the hub's cache holds.

    Raises:
        BaseModelError: the model is missing, incomplete or not supported; the message names what
            is missing.
    """

    def __init__(
        self, source: str | Path, *, revision: str | None = None, local_files_only: bool = False
    ) -> None:
        self.source = str(source)
        self.folder = find(source, revision, local_files_only)
        for part in PARTS:
            if not (self.folder / part).is_dir():
                raise BaseModelError(
                    f"{self.folder} has no {part}/: pass a Stable Diffusion folder of diffusers"
                )
        check_index(self.folder)
        path = self.folder / "unet" / "config.json"
        config = read_json(path)
        self.unet_config = UNetConfig.from_dict(config)
        if (self.unet_config.in_channels, self.unet_config.out_channels) != (4, 4):
            raise BaseModelError(
                f"the UNet maps {self.unet_config.in_channels} to {self.unet_config.out_channels} "
                "channels, expected 4 to 4: pass a text-to-image model (inpainting models are not "
                "supported)"
            )
        # (height, width) of the latents that it was trained on
        self.latent_size = configs.sample_size_of(path, config.get("sample_size"))
        self.unet = TensorFile(weights_file(self.folder / "unet", STEMS["unet"]))

    @property
    def sample_size(self) -> int:
        """The longer side of `latent_size`."""
        return max(self.latent_size)

    @property
    def picture_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the base model was trained on."""
        height, width = self.latent_size
        return height * self.pixels_per_latent, width * self.pixels_per_latent

    @property
    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """(channels, context width) of every attention site, by diffusers' module path."""
        keys = {name: self.unet.shape(name) for name in self.unet if name.endswith(".to_k.weight")}
        for name, shape in keys.items():
            if len(shape) != 2:
                raise BaseModelError(
                    f"{self.unet.path}: {name} has shape {list(shape)}, expected two "
                    "dimensions: download it again"
                )
        return {n.removesuffix(".to_k.weight"): (k[0], k[1]) for n, k in keys.items()}

    @property
    def text_layers(self) -> dict[str, int]:
        """Hidden width of every attention layer of the text encoder, by its module path."""
        # not `_text_values`: an adapter of another base is told by its own layers
        path = self.folder / "text_encoder" / "config.json"
        try:
            config = json.loads(path.read_text("utf-8"))
            config = config.get("text_config") or config
            width, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(
                f"{path} cannot be read: the base model is incomplete, download it again"
            ) from error
        layer = "text_model.encoder.layers.{}.self_attn"
        return {layer.format(n): width for n in range(layers)}

    @cached_property
    def _schedulers(self) -> Schedulers:
        return Schedulers(self.folder / "scheduler" / "scheduler_config.json")

    @property
    def scheduler(self) -> Any:
        """The base model's own diffusers scheduler; never stepped, only configured from."""
        return self._schedulers.own

    def make_scheduler(self, name: str | None, options: Mapping[str, Any] | None = None) -> Any:
        """A fresh scheduler by class name, configured like the base's own.

        options: in place of the base's, by their names in `Sampling`. Raises SettingsError, also
        from `set_timesteps` for a count that the scheduler cannot take.
        """
        return self._schedulers.make(name, options)

    def noiser(self) -> Any:
        """DDPM on the base's noise schedule, for `add_noise`."""
        return self._schedulers.noiser()

    def check(self) -> None:
        """Check what can be checked before weights are read: all shapes, values, the scheduler."""
        _ = self._schedulers, self._vae_values, self._text_values
        self.unet.check(_shapes(self._empty_unet()))

    @cached_property
    def _text_values(self) -> dict[str, Any]:
        path = self.folder / "text_encoder" / "config.json"
        return configs.text_values(path, self.unet_config.context_width)

    @cached_property
    def _vae_values(self) -> dict[str, Any]:
        return configs.vae_values(self.folder / "vae" / "config.json")

    def load_text(self) -> tuple[Any, Any]:
        """(tokenizer, text encoder in fp32)."""
        from transformers import CLIPTextConfig, CLIPTextModel
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = self.load_tokenizer()
        tensors = self._text_tensors()
        with blamed_on(self.folder / "text_encoder"):
            # these shape the pooled output alone, which nothing reads; they have to be valid tokens
            last = self._text_values["vocab_size"] - 1
            special = {"bos_token_id": last - 1, "eos_token_id": last, "pad_token_id": last}
            config = CLIPTextConfig(**self._text_values, **special)
            with torch.device("meta"):
                empty = CLIPTextModel(config)
            tensors.check({_text_name(name) or name: s for name, s in _shapes(empty).items()})
            # transformers maps released names to its own
            loaded: Any = CLIPTextModel.from_pretrained(
                None,
                config=config,
                state_dict={f"text_model.{name}": tensors[name] for name in tensors},
                dtype=torch.float32,
                output_loading_info=True,
            )
            encoder, info = loaded
            if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
                raise BaseModelError(f"{tensors.path} lacks {wrong[0]}: download it again")
        return tokenizer, encoder.eval().requires_grad_(False)

    def load_tokenizer(self) -> Any:
        """The CLIP tokenizer, its length bounded by the text encoder's positions."""
        from transformers import CLIPTokenizer

        folder, values = self.folder / "tokenizer", self._text_values
        check_files(folder)
        contents = {path.name: read_json(path) for path in sorted(folder.glob("*.json"))}
        for name in ("vocab.json", "merges.txt"):
            if not (folder / name).exists() and not (folder / "tokenizer.json").exists():
                raise BaseModelError(f"{folder / name} is missing: {AGAIN}")
        ids = list(contents.get("vocab.json", {}).values())
        if not all(type(n) is int for n in ids) or len(set(ids)) < len(ids):
            raise BaseModelError(
                f"{folder}/vocab.json gives tokens no number, or one twice: {AGAIN}"
            )
        with blamed_on(folder):
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
            limit = configs.token_limit(
                folder / "tokenizer_config.json",
                tokenizer.model_max_length,
                values["max_position_embeddings"],
            )
            tokenizer.model_max_length = limit
            ids = tokenizer("a", padding="max_length", max_length=limit).input_ids
            highest = max(tokenizer.get_vocab().values())
            special = tokenizer.bos_token, tokenizer.eos_token
        if special != _SPECIAL or len(ids) != limit or ids[0] != tokenizer.bos_token_id:
            raise BaseModelError(
                f"{folder} does not put prompts between {' and '.join(_SPECIAL)} and fill them to "
                f"{limit} tokens: use the tokenizer of the same model"
            )
        if highest >= values["vocab_size"]:
            raise BaseModelError(
                f"{folder} has a token {highest}, the text encoder knows {values['vocab_size']}: "
                "use the tokenizer of the same model"
            )
        return tokenizer

    def load_unet(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The UNet as diffusers', frozen; the engine runs its own."""
        unet = self._empty_unet()
        self.unet.check(_shapes(unet))
        tensors = {name: self.unet[name].to(device, dtype) for name in self.unet}
        unet.load_state_dict(tensors, assign=True)
        return unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        from diffusers import AutoencoderKL

        tensors = self._vae_tensors()
        with blamed_on(self.folder / "vae"), torch.device("meta"):
            vae: Any = AutoencoderKL(**self._vae_values)
        tensors.check(_shapes(vae))
        vae.load_state_dict({name: tensors[name].to(dtype) for name in tensors}, assign=True)
        layout = torch.channels_last
        if device.type == "cpu" and dtype == torch.float32:
            # channels last, PyTorch's GroupNorm on a CPU loses more digits the larger the map is
            layout = torch.contiguous_format
        return vae.to(device, memory_format=layout).eval().requires_grad_(False)

    def _empty_unet(self) -> Any:
        """diffusers' UNet without weights."""
        from diffusers import UNet2DConditionModel

        with blamed_on(self.folder / "unet"), torch.device("meta"):
            return UNet2DConditionModel(**configs.unet_values(self.unet_config))

    def _vae_tensors(self) -> TensorFile:
        return TensorFile(weights_file(self.folder / "vae", STEMS["vae"]), _vae_name)

    def _text_tensors(self) -> TensorFile:
        path = weights_file(self.folder / "text_encoder", STEMS["text_encoder"])
        return TensorFile(path, _text_name)

    @property
    def pixels_per_latent(self) -> int:
        """How much the VAE shrinks a side."""
        return int(2 ** (len(self._vae_values["block_out_channels"]) - 1))

    @cached_property
    def sha256(self) -> str:
        """One hash of every weight and value that shapes a picture; see `identity`."""
        values = {
            "unet": {**asdict(self.unet_config), "sample_size": self.latent_size},
            "vae": self._vae_values,
            "text_encoder": self._text_values,
            "tokenizer": tokenizer_values(self.load_tokenizer()),
            "scheduler": self._schedulers.values(),
        }
        weights = {
            "unet": self.unet,
            "vae": self._vae_tensors(),
            "text_encoder": self._text_tensors(),
        }
        return identity(values, weights)


def _shapes(module: torch.nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _vae_name(stored: str) -> str:
    """The name of today's diffusers for a tensor of the VAE."""
    parts = stored.split(".")
    if len(parts) > 2 and "attentions" in parts and parts[-2] in _VAE_NAMES:
        parts[-2] = _VAE_NAMES[parts[-2]]
    return ".".join(parts)


def _text_name(stored: str) -> str | None:
    """A tensor of the text encoder without the prefix that transformers 5 dropped."""
    name = stored.removeprefix("text_model.")
    # counts from 0, which transformers does itself
    return None if name == "embeddings.position_ids" else name
