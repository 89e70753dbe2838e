"""Prompts -> embeddings, with the adapter's LoRA on the text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dualdiff_engine.adapters import fold as weights
from dualdiff_engine.adapters.format import LowRank
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import Prompts


class TextEncoder:
    """The base's CLIP text encoder in fp32; adapters lend it other weights for a call."""

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self._names = dict(encoder.named_parameters())
        # transformers 5 dropped the prefix that released adapters still carry
        self._prefix = "text_model." if "text_model.encoder" in " ".join(self._names) else ""

    def own_name(self, layer: str) -> str:
        """A layer's name in released adapters -> the encoder's own."""
        return self._prefix + layer.removeprefix("text_model.")

    @property
    def layers(self) -> dict[str, int]:
        """Hidden width by self-attention layer, under the names released adapters use."""
        return {
            "text_model." + name.removeprefix(self._prefix).removesuffix(".q_proj.weight"): p.shape[
                0
            ]
            for name, p in self._names.items()
            if name.endswith(".self_attn.q_proj.weight")
        }

    def fold(self, lora: Mapping[str, Mapping[str, LowRank]]) -> dict[str, Tensor]:
        """The weights an adapter changes, merged anew from the pristine encoder."""
        own = {self.own_name(layer): pairs for layer, pairs in lora.items()}
        return weights.fold_text_encoder(self._names, own)

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token ids [len(prompts), L]. Raises SettingsError for a prompt that is too long."""
        limit = self.tokenizer.model_max_length
        ids = self.tokenizer(prompts, padding="max_length", max_length=limit).input_ids
        for prompt, own in zip(prompts, ids, strict=True):
            if len(own) > limit:
                raise SettingsError(
                    f"prompt of {len(own)} tokens, at most {limit}: {prompt[:60]!r}…"
                )
        return torch.tensor(ids)

    def places(self, tokens: Tensor, word: str) -> Tensor:
        """Where a word first stands in prompts: token ids [..., L] -> 1.0 for its tokens, else 0.

        All zero for a prompt without it.
        """
        ids = self.tokenizer(word, add_special_tokens=False).input_ids
        found = torch.zeros(tokens.shape)
        for row, flags in zip(tokens.flatten(0, -2), found.flatten(0, -2), strict=True):
            starts = (row.unfold(0, len(ids), 1) == torch.tensor(ids)).all(-1).nonzero()
            if len(starts):
                first = int(starts[0])
                flags[first : first + len(ids)] = 1
        return found

    def encode(self, tokens: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        """Token ids [n, L] -> [n, L, X] fp32; changed: as from `fold`, empty for the base alone."""
        ids = tokens.to(self.encoder.device)
        return torch.func.functional_call(self.encoder, dict(changed), (ids,))[0]

    def tokenize_pair(self, prompts: Prompts) -> Tensor:
        """Token ids [4, L] of both branches' negative prompt and prompt. Raises SettingsError."""
        return self.tokenize([prompts.negative, prompts.image, prompts.negative, prompts.anomaly])

    def encode_pair(self, tokens: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        """tokens as from `tokenize_pair` -> [2 branches, 2 rows (negative, prompt), L, X] fp32."""
        return self.encode(tokens, changed).unflatten(0, (2, 2))
