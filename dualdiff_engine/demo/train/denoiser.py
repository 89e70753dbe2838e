"""Trains the demo's denoiser and text encoder on good parts."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.demo.factory.fields import SIZE

STEPS, RATE = 3600, 1e-3
BATCH = 16
AVERAGING = 0.998
EMPTY_PROMPTS = 0.1
WIDTH, TOKENS = 64, 16
# one token each; any other word is spelled, letter by letter
WORDS = ("a", "piece", "of", "with", "on", "vfx", "sks", "washer", "fabric", "tile", "scratch",
         "stain", "hole", "crack", "chip")  # fmt: skip
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    # velocity (Salimans & Ho 2022) instead of noise: where little but noise is left, a small error
    # in predicted noise is a large one in colour
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def build_unet() -> Any:
    """SD-1.5's blocks, three levels; as there, only the lowest level's blocks have no sites."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 96, 160),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        # of heads, as in SD-1.5's file
        attention_head_dim=2,
        norm_num_groups=16,
    )


def write_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer of bytes and of `WORDS`, as files."""
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merged = pieces[0] + pieces[1]
            if f"{pieces[0]} {pieces[1]}" not in merges:
                merges.append(f"{pieces[0]} {pieces[1]}")
                vocabulary.append(merged)
            pieces = [merged, *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    codes = {token: code for code, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(codes, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {**special, "model_max_length": TOKENS, "tokenizer_class": CLIPTokenizer.__name__}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def load_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    end = tokenizer.eos_token_id
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def tokenise(tokenizer: Any, prompts: list[str]) -> Tensor:
    """int64 [n, TOKENS]."""
    return torch.tensor(tokenizer(prompts, padding="max_length", max_length=TOKENS).input_ids)


def train(
    unet: Any, text: Any, latents: Tensor, tokens: Tensor, empty: Tensor, seed: int, log: Any
) -> float:
    """Train both in place, to the running average of their weights. Returns the last mean loss.

    latents fp32 [n, 4, h, w]; tokens int64 [n, L]; empty int64 [L], the empty prompt's. Mean
    squared error (Ho et al. 2020) of the velocity, in bfloat16 where autocast takes it; one
    timestep of every sixteenth of them in every batch.
    """
    from diffusers import DDPMScheduler

    noiser: Any = DDPMScheduler.from_config({**SCHEDULER, "_class_name": "DDPMScheduler"})
    unet.to(memory_format=torch.channels_last)
    modules = torch.nn.ModuleList([unet, text]).train()
    generator = torch.Generator().manual_seed(seed)
    average = copy.deepcopy(modules).requires_grad_(False)
    optimizer = torch.optim.AdamW(modules.parameters(), RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    start, mean = time.monotonic(), 1.0
    for step in range(STEPS):
        chosen = torch.randint(len(latents), (BATCH,), generator=generator)
        words = tokens[chosen]
        words[torch.rand(BATCH, generator=generator) < EMPTY_PROMPTS] = empty
        with torch.autocast("cpu", torch.bfloat16):
            loss = _loss(unet, text, noiser, latents[chosen], words, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        _average(average, modules, step)
        mean = 0.99 * mean + 0.01 * loss.item()
        if step % 100 == 99:
            log(f"denoiser {step + 1}/{STEPS} loss {mean:.4f} {time.monotonic() - start:.0f} s")
    modules.load_state_dict(average.state_dict())
    modules.eval()
    return mean


def _loss(
    unet: Any, text: Any, noiser: Any, clean: Tensor, words: Tensor, generator: torch.Generator
) -> Tensor:
    noise = torch.randn(clean.shape, generator=generator)
    places = torch.arange(BATCH) + torch.rand(BATCH, generator=generator)
    times = (places * (noiser.config.num_train_timesteps / BATCH)).long()
    noised = noiser.add_noise(clean, noise, times).contiguous(memory_format=torch.channels_last)
    velocity = unet(noised, times, text(words)[0]).sample
    return torch.nn.functional.mse_loss(velocity.float(), noiser.get_velocity(clean, noise, times))


@torch.no_grad()
def _average(average: torch.nn.Module, modules: torch.nn.Module, step: int) -> None:
    share = 1 - min(AVERAGING, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), share)
