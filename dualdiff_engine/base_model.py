"""The Stable Diffusion base model: find it, check it, read its weights as late as possible.

Text encoder, VAE, tokenizer and scheduler are transformers' and diffusers'. The UNet's tensors stay
in their file until the weights module asks for one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualdiff_engine.errors import BaseModelError, SettingsError
from dualdiff_engine.files import sha256_of
from dualdiff_engine.model.config import UNetConfig

# of a folder with exported graphs in place of a base model's weights
BUNDLE = "bundle.json"
_WEIGHTS = "diffusion_pytorch_model"
_HUB_FILES = [
    "model_index.json",
    "*/*.json",
    "tokenizer/*",
    f"unet/{_WEIGHTS}.safetensors",
    f"vae/{_WEIGHTS}.safetensors",
    "text_encoder/model.safetensors",
]


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when asked for and not kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                self._names = dict.fromkeys(file.keys())
        except (SafetensorError, OSError) as error:
            raise BaseModelError(
                f"{path} is not a valid safetensors file ({error}): download it again"
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise BaseModelError(
                f"{self.path} has no tensor {name}: the base model is incomplete, download it again"
            )
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, read from the header alone."""
        with safe_open(self.path, "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
        self.folder = _folder(source, revision, local_files_only)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if not (self.folder / part).is_dir():
                raise BaseModelError(
                    f"{self.folder} has no {part}/: pass a Stable Diffusion folder of diffusers"
                )
        config = read_json(self.folder / "unet" / "config.json")
        self.unet_config = UNetConfig.from_dict(config)
        if (self.unet_config.in_channels, self.unet_config.out_channels) != (4, 4):
            raise BaseModelError(
                f"the UNet maps {self.unet_config.in_channels} to {self.unet_config.out_channels} "
                "channels, expected 4 to 4: pass a text-to-image model (inpainting models are not "
                "supported)"
            )
        self.sample_size = int(config.get("sample_size", 64))
        self.unet = TensorFile(_weights_file(self.folder / "unet", _WEIGHTS))

    @property
    def site_shapes(self) -> dict[str, tuple[int, int]]:
        """(channels, context width) of every attention site, by diffusers' module path."""
        keys = {name: self.unet.shape(name) for name in self.unet if name.endswith(".to_k.weight")}
        return {n.removesuffix(".to_k.weight"): (k[0], k[1]) for n, k in keys.items()}

    @cached_property
    def scheduler(self) -> Any:
        """The base model's own diffusers scheduler; never stepped, only configured from."""
        import diffusers

        config = read_json(self.folder / "scheduler" / "scheduler_config.json")
        scheduler = getattr(diffusers, str(config.get("_class_name")), None)
        if scheduler is None or not hasattr(scheduler, "from_config"):
            raise BaseModelError(
                f"{self.folder}/scheduler: diffusers has no scheduler "
                f"{config.get('_class_name')!r}; correct _class_name or download the model again"
            )
        return scheduler.from_config(config)

    def make_scheduler(self, name: str | None) -> Any:
        """A fresh scheduler by class name, configured like the base's own. Raises SettingsError."""
        kinds = {kind.__name__: kind for kind in self.scheduler.compatibles}
        kinds[type(self.scheduler).__name__] = type(self.scheduler)
        kind = kinds.get(name or type(self.scheduler).__name__)
        if kind is None:
            raise SettingsError(f"no scheduler {name!r}: choose one of {', '.join(sorted(kinds))}")
        try:
            return kind.from_config(self.scheduler.config)
        except ImportError as error:
            raise SettingsError(f"scheduler {name!r} needs another package: {error}") from error

    def noiser(self) -> Any:
        """DDPM on the base's noise schedule, for `add_noise`."""
        from diffusers import DDPMScheduler

        return DDPMScheduler.from_config(self.scheduler.config)

    def load_text(self) -> tuple[Any, Any]:
        """(tokenizer, text encoder in fp32)."""
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        _weights_file(self.folder / "text_encoder", "model")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
            encoder = CLIPTextModel.from_pretrained(
                self.folder / "text_encoder", dtype=torch.float32, use_safetensors=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"{self.folder}/text_encoder or tokenizer: {error}") from error
        return tokenizer, encoder.eval().requires_grad_(False)

    def load_unet(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The UNet as diffusers', frozen; the engine runs its own."""
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            unet: Any = UNet2DConditionModel.from_config(
                read_json(self.folder / "unet" / "config.json")
            )
        tensors = {name: self.unet[name].to(device, dtype) for name in self.unet}
        try:
            unet.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise BaseModelError(f"unet weights do not match unet/config.json: {reason}") from error
        return unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any:
        from diffusers import AutoencoderKL

        _weights_file(self.folder / "vae", _WEIGHTS)
        try:
            vae = AutoencoderKL.from_pretrained(
                self.folder / "vae",
                torch_dtype=dtype,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise BaseModelError(f"{self.folder}/vae: {error}") from error
        layout = torch.channels_last
        if device.type == "cpu" and dtype == torch.float32:
            # channels last, PyTorch's GroupNorm on a CPU loses more digits the larger the map is
            layout = torch.contiguous_format
        return vae.to(device, memory_format=layout).eval().requires_grad_(False)

    @property
    def pixels_per_latent(self) -> int:
        """How much the VAE shrinks a side."""
        levels = read_json(self.folder / "vae" / "config.json").get("block_out_channels", [0])
        return int(2 ** (len(levels) - 1))

    @cached_property
    def sha256(self) -> str:
        """One hash of every weight and config that shapes a picture."""
        digest = hashlib.sha256()
        patterns = ("unet/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*")
        for path in sorted(p for pattern in patterns for p in self.folder.glob(pattern)):
            if path.suffix in (".json", ".safetensors", ".txt"):
                part = sha256_of(path)
                digest.update(f"{path.relative_to(self.folder).as_posix()} {part}\n".encode())
        return digest.hexdigest()


def _folder(source: str | Path, revision: str | None, local_files_only: bool) -> Path:
    path, name = Path(source), str(source)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:
        raise BaseModelError(f"no base model at {name[:80]!r}: {error.strerror}") from error
    if exists or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BaseModelError(f"no base model at {name!r}: pass a diffusers folder or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_HUB_FILES,
                local_files_only=local_files_only,
            )
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"no folder {name!r}, and it could not be downloaded: {str(error).splitlines()[0]}"
        ) from error


def _weights_file(folder: Path, stem: str) -> Path:
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).is_file():
            return folder / name
    raise BaseModelError(
        f"{folder} has no {stem}.safetensors (pickled weights are not read): save the model with "
        "safe_serialization=True"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises BaseModelError."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path} cannot be read ({error}): download the model again"
        ) from error
    if not isinstance(content, dict):
        raise BaseModelError(f"{path} is not a JSON object: download the model again")
    return content
