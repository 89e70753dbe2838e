"""Adapters saved through a wrapper of the network: DistributedDataParallel, PEFT and others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualdiff_engine import AdapterError, adapters
from dualdiff_engine.adapters import files
from support import DATA


def released() -> dict[str, Tensor]:
    return torch.load(DATA / "dual/adapter/pytorch_lora_weights.bin", weights_only=True)


@pytest.mark.parametrize(
    ("plain", "wrapped"),
    [
        ("unet.", "module.unet."),
        ("unet.", "_orig_mod.unet."),
        ("unet.", "_orig_mod.module.unet."),
        ("unet.", "unet.module."),
        ("unet.", "unet._orig_mod."),
        ("unet.", "unet.module._orig_mod."),
        ("unet.", "module.unet._orig_mod."),
        (".processor.", "._orig_mod.processor.module."),
        ("unet.", "base_model.model.unet."),
        ("unet.", "unet.base_model.model."),
        (".attn1.", "._checkpoint_wrapped_module.attn1."),
    ],
)
def test_a_wrapped_adapter_is_the_same(tmp_path: Path, plain: str, wrapped: str) -> None:
    tensors = released()
    path = tmp_path / "wrapped.safetensors"
    files.write(path, {name.replace(plain, wrapped, 1): t for name, t in tensors.items()})
    ours, theirs = adapters.load(path), adapters.parse(tensors)
    assert ours.sites.keys() == theirs.sites.keys()
    assert (ours.rank, ours.parameters) == (theirs.rank, theirs.parameters)
    for name, site in theirs.sites.items():
        for part, affine in site.parts.items():
            assert torch.equal(affine.weight, ours.sites[name].parts[part].weight)


def test_twice_the_same_tensor_is_refused() -> None:
    tensors = released()
    name = next(iter(tensors))
    with pytest.raises(AdapterError, match="occurs twice, with and without module"):
        adapters.parse({**tensors, f"module.{name}": tensors[name]})


@pytest.mark.parametrize("prefix", ["ema.", "state_dict.", "model."])
def test_a_prefix_that_is_no_wrappers_is_named(prefix: str) -> None:
    tensors = {f"{prefix}{name}": tensor for name, tensor in released().items()}
    with pytest.raises(AdapterError, match=rf"starts with '{prefix}', .*: save it again without"):
        adapters.parse(tensors)


def test_other_families_are_still_named() -> None:
    with pytest.raises(AdapterError, match="kohya"):
        adapters.parse({"module.lora_unet_down.weight": torch.ones(1)})
