"""What complete adapters mean: released or converted, in any precision, with all parts or few."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapter_cases import (
    DATA,
    LAYER,
    RANK,
    SELF,
    WIDTH,
    both,
    drop,
    edit,
    extend,
    golden,
    saved,
    tiny,
)
from dualdiff_engine import adapters
from dualdiff_engine.adapters.format import Adapter

PLAIN, CHAINED = tiny(), tiny(background=True, chained=True)


@pytest.mark.parametrize(("case", "background"), [("dual", False), ("bcm", True)])
def test_the_released_format_is_read(case: str, background: bool) -> None:
    tensors = golden(case)
    adapter = adapters.load(DATA / case / "adapter", allow_pickle=True)
    assert (adapter.rank, len(adapter.sites), len(adapter.text)) == (4, 20, 2)
    assert adapter.has_background is background
    assert adapter.parameters == sum(tensor.numel() for tensor in tensors.values())
    for site, held in adapter.sites.items():
        prefix = f"unet.{site}.processor."
        if background and site.endswith("attn1"):
            prefix += "chained_proc."
            assert held.background is not None
            assert torch.equal(held.background.amount, tensors[prefix + "temporal_a"])
            mlp = prefix + "temporal_condition_mlp"
            assert torch.equal(held.background.reduce.weight, tensors[f"{mlp}.0.weight"])
            assert torch.equal(held.background.expand.bias, tensors[f"{mlp}.1.bias"])
        else:
            assert held.background is None
        for branch, pairs in enumerate(held.lora):
            for part, pair in pairs.items():
                name = f"{prefix}to_{part}_lora.{branch}"
                assert torch.equal(pair.down, tensors[f"{name}.down.weight"])
                assert torch.equal(pair.up, tensors[f"{name}.up.weight"])
        for part, affine in held.parts.items():
            name = f"{prefix}temporal_{'o' if part == 'output' else part[0]}"
            assert torch.equal(affine.weight, tensors[f"{name}.weight"])
            assert torch.equal(affine.bias, tensors[f"{name}.bias"])
    for layer, pairs in adapter.text.items():
        for part, pair in pairs.items():
            name = f"text_encoder.{layer}.to_{part}_lora"
            assert torch.equal(pair.down, tensors[f"{name}.down.weight"])
            assert torch.equal(pair.up, tensors[f"{name}.up.weight"])


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(same(x, y) for x, y in zip(a, b, strict=True))
    if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
        return same(vars(a), vars(b))
    return a == b


def unnamed(adapter: Adapter) -> Adapter:
    return dataclasses.replace(adapter, source="", sha256="")


def test_both_spellings_are_the_same() -> None:
    tensors = golden("bcm")
    short = {name.replace("chained_proc.", ""): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    assert same(adapters.parse(short), adapters.parse(tensors))
    # a checkpoint may mix them, site by site
    mixed = {
        name.replace("chained_proc.", "") if "mid_block" in name else name: tensor
        for name, tensor in tensors.items()
    }
    assert same(adapters.parse(mixed), adapters.parse(tensors))
    assert not same(adapters.parse(golden("dual")), adapters.parse(tensors))


@pytest.mark.parametrize("case", ["dual", "bcm"])
def test_conversion_parses_the_same(tmp_path: Path, case: str) -> None:
    source, target = DATA / case / "adapter", tmp_path / "new" / "a.safetensors"
    converted = adapters.convert(source, target)
    assert same(adapters.load(target), converted)
    assert converted.source == str(target)
    assert re.fullmatch("[0-9a-f]{64}", converted.sha256)
    original = adapters.load(source, allow_pickle=True)
    assert same(unnamed(converted), unnamed(original))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_precisions_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    path = saved(tmp_path, {name: tensor.to(dtype) for name, tensor in CHAINED.items()})
    adapter = adapters.load(path)
    assert adapter.rank == RANK
    assert adapter.sites[SELF].lora[1]["k"].up.dtype == dtype
    assert isinstance(next(iter(adapters.summary(adapter).blend.values())), float)


def test_background_may_be_absent_at_text_sites() -> None:
    tensors = dict(CHAINED)
    drop("attn2.*(temporal_a|mlp)")(tensors)
    assert same(adapters.parse(tensors).sites, adapters.parse(CHAINED).sites)


def test_text_lora_may_be_absent() -> None:
    tensors = dict(PLAIN)
    drop("text_encoder")(tensors)
    assert adapters.parse(tensors).text == {}


def test_text_rank_may_differ_from_the_unet() -> None:
    tensors = dict(PLAIN)
    both(edit(r"text.*\.down\.", extend(0)), edit(r"text.*\.up\.", extend(1)))(tensors)
    adapter = adapters.parse(tensors)
    assert adapter.rank == RANK
    assert adapter.text[LAYER]["q"].down.shape == (RANK + 1, WIDTH)


@pytest.mark.parametrize(("case", "background"), [("dual", False), ("bcm", True)])
def test_summary(case: str, background: bool) -> None:
    tensors = golden(case)
    adapter = adapters.load(DATA / case / "adapter", allow_pickle=True)
    shown = adapters.summary(adapter).record()
    blend = shown.pop("blend")
    assert isinstance(blend, dict)
    assert len(blend) == (10 if background else 0)
    for site, amount in blend.items():
        assert amount == tensors[f"unet.{site}.processor.chained_proc.temporal_a"].item()
    assert shown == {
        "file": str(DATA / case / "adapter" / "pytorch_lora_weights.bin"),
        "sha256": adapter.sha256,
        "branches": ["image", "anomaly"],
        "rank": 4,
        "sites": 20,
        "background": background,
        "text_encoder_layers": 2,
        "parameters": adapter.parameters,
        "context_width": [32],
        "base": "a model with text width 32",
        "window": None,
        "distilled": None,
        "coupling": None,
    }
