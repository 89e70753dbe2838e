"""What an export takes on the disk, known before anything is traced."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from dualdiff_engine.engine import Engine
from dualdiff_engine.export.folder.folded import in_precision, text_names
from dualdiff_engine.export.graph.modules import Size
from dualdiff_engine.export.graph.progress import Say
from dualdiff_engine.files import in_words, require_space

# text encoder and both sides of the VAE; an adapter's denoiser and background encoder
_BASE_GRAPHS, _ADAPTER_GRAPHS = 3, 2
# nodes and names of one graph: more than twice what Stable Diffusion's largest takes
_GRAPH_BYTES = 4 << 20
# names, alignment, and the next to nothing that manifests and tokenizers take
_FILE_BYTES = 4 << 20


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def base_bytes(engine: Engine, dtype: torch.dtype) -> int:
    """At most what the base model's weights and graphs take, which adapters share."""
    encoder, sites = engine.text_encoder, engine.active.sites
    changed = text_names(encoder)
    unet = sum(
        weight.numel() * dtype.itemsize
        for name, weight in engine.unet.named_parameters()
        if name not in sites
    )
    text = _bytes(w.float() for n, w in encoder.encoder.named_parameters() if n not in changed)
    vae = _bytes(weight.float() for weight in engine.vae.parameters())
    return unet + text + vae + _BASE_GRAPHS * _GRAPH_BYTES + _FILE_BYTES


def adapter_bytes(engine: Engine, dtype: torch.dtype, size: Size) -> int:
    """At most what the active adapter, its probe and the graphs that it needs take."""
    encoder = engine.text_encoder
    sites = _bytes(in_precision(name, t, dtype) for name, t in engine.active.sites.items())
    text = _bytes(encoder.encoder.get_parameter(name).float() for name in text_names(encoder))
    pixels = engine.base.pixels_per_latent**2
    # a decoded picture, and latents and noise of two branches, with and without a background
    probe = 4 * size.height * size.width * (3 * pixels + 4 * 8)
    width = engine.base.unet_config.context_width
    context = 4 * math.prod((4, size.tokens, width + 1))
    graphs = _ADAPTER_GRAPHS * _GRAPH_BYTES
    return sites + text + probe + context + graphs + _FILE_BYTES


def require(folder: Path, needed: int, say: Say) -> None:
    """Say what is needed and what is free.

    folder: where it is written. needed: in bytes. Raises OutputError when there is less.
    """
    what = "estimating space"
    say(what)
    free = require_space(folder, needed, "the export")
    say(f"{what}: at most {in_words(needed)}, {in_words(free)} are free")
