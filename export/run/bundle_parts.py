"""The parts of an engine that a bundle brings in place of the base model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.adapters.format import LowRank
from dualdiff_engine.base_model import BaseModel, TensorFile, read_json
from dualdiff_engine.errors import BackendError, BaseModelError
from dualdiff_engine.export.folder.artefact import Artefact
from dualdiff_engine.export.run.denoiser import initializers, only
from dualdiff_engine.export.run.onnx_session import Session
from dualdiff_engine.model.config import UNetConfig
from dualdiff_engine.pipeline.text import TextEncoder

_FOLDED = (
    "a bundle holds no base weights to fold an adapter into: add it to the bundle with "
    "`dualdiff export adapter`"
)


class NoWeights(TensorFile):
    """The base's tensors, which a bundle does not hold."""

    def __init__(self) -> None:
        pass

    def __getitem__(self, name: str) -> Tensor:
        raise BackendError(_FOLDED)

    def __iter__(self) -> Iterator[str]:
        raise BackendError(_FOLDED)

    def __len__(self) -> int:
        return 0


class BundledBase(BaseModel):
    """What an engine asks of a base model, from a bundle."""

    def __init__(self, folder: Path, graphs: Mapping[str, Artefact]) -> None:
        one = next(iter(graphs.values()))
        self.source, self.folder = one.base.source, folder
        path = folder / "unet" / "config.json"
        try:
            self.unet_config = UNetConfig.from_dict(read_json(path))
        except BaseModelError as error:
            raise BackendError(f"{path}: {error} (copy the whole bundle again)") from error
        # of a size that is fixed, the engine's default must be that one
        self.latent_size = one.height, one.width
        self.unet = NoWeights()
        self._sha256, self._tokens = one.base.sha256, one.tokens

    @property
    def sha256(self) -> str:
        return self._sha256

    def load_tokenizer(self) -> Any:
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.folder / "tokenizer", local_files_only=True)
        # the graphs were traced at this length; the tokenizer's own may have been bounded by a
        # text encoder's configuration that no bundle holds
        tokenizer.model_max_length = self._tokens or tokenizer.model_max_length
        return tokenizer


class BundledText(TextEncoder):
    """The exported text encoder, with an adapter's weights in it."""

    def __init__(
        self, tokenizer: Any, path: Path, about: Artefact, width: int, device: torch.device
    ) -> None:
        """width: X of the embeddings [n, L, X] that the denoiser reads."""
        self.tokenizer, self._width = tokenizer, width
        self._path, self._about, self._device = path, about, device
        self._built: tuple[Mapping[str, Tensor], Session] | None = None

    @property
    def layers(self) -> dict[str, int]:
        raise BackendError(_FOLDED)

    def fold(self, lora: Mapping[str, Mapping[str, LowRank]]) -> dict[str, Tensor]:
        raise BackendError(_FOLDED)

    def encode(self, tokens: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        if self._built is None or self._built[0] is not changed:
            values = initializers(changed, self._about)
            self._built = changed, Session(self._path, self._device, values)
        outputs = self._built[1](input_ids=tokens)
        return only(outputs, (*tokens.shape, self._width), self._path).cpu()


class BundledVae:
    """The exported VAE under the names that diffusers gives its own."""

    dtype = torch.float32

    def __init__(
        self,
        folder: Path,
        graphs: Mapping[str, Artefact],
        pixels_per_latent: int,
        device: torch.device,
    ) -> None:
        config = SimpleNamespace(scaling_factor=graphs["vae_decoder"].scaling_factor)
        self.config, self._scale = config, pixels_per_latent
        self.device, self._folder, self._graphs = device, folder, graphs
        self._sessions: dict[str, Session] = {}

    def decode(self, latents: Tensor) -> SimpleNamespace:
        count, _, height, width = latents.shape
        shape = (count, 3, height * self._scale, width * self._scale)
        sample = self._run("vae_decoder", shape, latent_sample=latents.float())
        return SimpleNamespace(sample=sample)

    def encode(self, picture: Tensor) -> SimpleNamespace:
        count, _, height, width = picture.shape
        shape = (count, 4, height // self._scale, width // self._scale)
        mean = self._run("vae_encoder", shape, sample=picture.float())
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean))

    def to(self, *_: object) -> BundledVae:
        """What an engine calls to drop weights."""
        self._sessions.clear()
        return self

    def _run(self, graph: str, shape: tuple[int, ...], **inputs: Tensor) -> Tensor:
        return only(self._session(graph)(**inputs), shape, self._folder / f"{graph}.onnx")

    def _session(self, graph: str) -> Session:
        if graph not in self._graphs:
            raise BackendError(
                f"{self._folder} holds no {graph}.onnx, which this request needs: write the bundle "
                "again with `dualdiff export bundle`"
            )
        if graph not in self._sessions:
            self._sessions[graph] = Session(self._folder / f"{graph}.onnx", self.device)
        return self._sessions[graph]
