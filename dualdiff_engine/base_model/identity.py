"""One hash of what shapes a picture: the weights that are read and the values that are used.

Licences, second variants, comments, the layout of JSON and the cut into shards do not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from dualdiff_engine.base_model.tensors import TensorFile


def identity(values: Mapping[str, Any], weights: Mapping[str, TensorFile]) -> str:
    """SHA-256 in hexadecimal.

    values: by part, what JSON can hold. weights: by part; name, dtype, shape and content count.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(_plain(values), sort_keys=True, separators=(",", ":")).encode())
    for part, tensors in sorted(weights.items()):
        for name in sorted(tensors):
            tensor = tensors[name]
            digest.update(f"\n{part} {name} {tensors.dtype(name)} {list(tensor.shape)}\n".encode())
            content = tensor.contiguous().reshape(-1).view(torch.uint8)
            digest.update(content.numpy().data)
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """The same for JSON, with 1 and 1.0 as one number."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def tokenizer_values(tokenizer: Any) -> dict[str, Any]:
    """What turns a prompt into ids: vocabulary, merges, special tokens, length."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return {
        "vocabulary": tokenizer.get_vocab(),
        "merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        "special": [
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
        ],
        "length": tokenizer.model_max_length,
    }
