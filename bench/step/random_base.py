"""A Stable Diffusion folder around a case's UNet, for what takes base models from disk.

Tokenizer, text encoder and VAE have random weights and are as small as they may be, or SD-1.5's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dualdiff_engine.bench.step.case import MODELS, SCALE, TEXT_TOKENS, base_weights, diffusers_unet

CLIP: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def write_base(
    root: Path, model: str, seed: int, *, full: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the folder; returns it.

    model: a name of `case.MODELS`. full: text encoder and VAE of SD-1.5's size. dtype: of the
    weights on disk.
    """
    (root / "unet").mkdir(parents=True)
    weights = base_weights(model, seed)
    save_file(
        {name: weights[name].to(dtype) for name in weights},
        root / "unet" / "diffusion_pytorch_model.safetensors",
    )
    config = dict(diffusers_unet(model).config)
    (root / "unet" / "config.json").write_text(json.dumps(config), "utf-8")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        tokens = _write_tokenizer(root / "tokenizer")
        width = MODELS[model]["cross_attention_dim"]
        _write_text(root / "text_encoder", width, tokens, full, dtype)
        _write_vae(root / "vae", MODELS[model]["sample_size"], SCALE[model], full, dtype)
    _write_scheduler(root / "scheduler")
    return root


def _write_tokenizer(folder: Path) -> int:
    """CLIP's, with a word for every byte and no others; returns how many there are."""
    from transformers import CLIPTokenizer

    # as GPT-2 writes bytes: those that print as themselves, the others as letters from 256 on
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(code) for code in (*plain, *range(256, 512 - len(plain)))]
    ends = [f"{letter}</w>" for letter in letters]
    words = [*letters, *ends, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return len(words)


def _write_text(folder: Path, width: int, tokens: int, full: bool, dtype: torch.dtype) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    least = {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        **(CLIP if full else least), bos_token_id=tokens - 2, eos_token_id=tokens - 1
    )
    encoder: Any = CLIPTextModel(config)
    encoder.to(dtype).save_pretrained(folder)


def _write_vae(folder: Path, latent: int, scale: int, full: bool, dtype: torch.dtype) -> None:
    """latent: numbers of a side; scale: pixels of a number's side, halved by each level but one."""
    from diffusers import AutoencoderKL

    levels = scale.bit_length()
    least = {"block_out_channels": (4,) * levels, "layers_per_block": 1, "norm_num_groups": 2}
    vae: Any = AutoencoderKL(
        **(VAE if full else least),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        sample_size=latent * scale,
    )
    # diffusers' own warns of layers to keep in float32, of which this VAE has none
    torch.nn.Module.to(vae, dtype).save_pretrained(folder)


def _write_scheduler(folder: Path) -> None:
    """SD-1.5's."""
    from diffusers import PNDMScheduler

    scheduler: Any = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.save_pretrained(folder)
