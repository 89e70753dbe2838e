"""Adapters of another base model: refused by what differs, before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from adapter_cases import (
    CHANNELS,
    DATA,
    LAYER,
    OURS_NOT,
    SELF,
    TEXT,
    WIDTH,
    Change,
    both,
    drop,
    edit,
    extend,
    golden,
    refusal,
    rename,
    saved,
    tiny,
)
from dualdiff_engine import AdapterError, Engine, adapters
from support import golden_engine

PLAIN = tiny()

SITES = {SELF: (CHANNELS, CHANNELS), TEXT: (CHANNELS, WIDTH)}
LAYERS = {LAYER: WIDTH}
REMEDY = "the adapter was trained on another base model; load that base"
OTHER = SELF.replace("mid_block", "down_blocks.1")
MISFITS: dict[str, tuple[dict[str, tuple[int, int]], dict[str, int], str]] = {
    "no-sites": ({}, LAYERS, f"^unet.{SELF}: the base model has no such attention site: {REMEDY}"),
    "site-the-base-lacks": (
        {SELF: SITES[SELF]},
        LAYERS,
        f"^unet.{TEXT}: the base model has no such attention site: {REMEDY}",
    ),
    "site-missing": (
        {**SITES, OTHER: SITES[SELF]},
        LAYERS,
        f"^unet.{OTHER} is missing; every attention site of the base.*{REMEDY}",
    ),
    "channels": (
        {**SITES, SELF: (8, 8)}, LAYERS,
        rf"^unet.{SELF} has .channels, context width. \(4, 4\), the base has \(8, 8\): {REMEDY}",
    ),
    "context-width": (
        {**SITES, TEXT: (4, 768)}, LAYERS, rf"^unet.{TEXT} has .*\(4, 6\), the base has \(4, 768\)"
    ),
    "text-width": (
        SITES, {LAYER: 768}, f"^text_encoder.{LAYER} has width 6, the base has 768: {REMEDY}"
    ),
    "text-layer-the-base-lacks": (
        SITES, {}, f"^text_encoder.{LAYER}: the base model has no such layer: {REMEDY}"
    ),
    "text-layer-missing": (
        SITES, {**LAYERS, LAYER.replace("0", "1"): WIDTH},
        f"^text_encoder.{LAYER.replace('0', '1')} is missing: .*use an intact copy",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("sites", "layers", "match"), MISFITS.values(), ids=MISFITS)
def test_adapters_of_another_base_are_refused(
    sites: Mapping[str, tuple[int, int]], layers: Mapping[str, int], match: str
) -> None:
    adapter = adapters.parse(PLAIN)
    refusal(lambda: adapters.check_fits(adapter, sites, layers), match)


def test_an_adapter_of_its_base_fits() -> None:
    adapters.check_fits(adapters.parse(PLAIN), SITES, LAYERS)
    without_text = dict(PLAIN)
    drop("text_encoder")(without_text)
    adapters.check_fits(adapters.parse(without_text), SITES, LAYERS)


DEEPEST = "unet.mid_block.attentions.0.transformer_blocks.0"
WRONG_FOR_THE_ENGINE: dict[str, tuple[Change, str]] = {
    "no-mid-block": (drop("mid_block"), f"^{DEEPEST}.attn1 is missing.*load that base"),
    "deeper": (
        rename(r"unet\.mid_block(.*)blocks\.0", r"unet.mid_block\1blocks.1"),
        "^unet.mid_block.attentions.0.transformer_blocks.1.attn1: .*no such attention site",
    ),
    "wider-text": (
        edit(r"attn2.*to_[kv]_lora.*down", extend(1)), r"\(16, 33\), the base has \(16, 32\)"
    ),
    "no-last-text-layer": (
        drop(r"layers\.1\."), r"^text_encoder.text_model.encoder.layers.1.self_attn is missing"
    ),
    "one-more-text-layer": (
        rename(r"layers\.1\.", "layers.2."), r"layers.2.self_attn: the base model has no such layer"
    ),
    "tiny": (both(drop("."), lambda t: t.update(PLAIN)), r"\(4, 4\), the base has"),
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    right = saved(tmp_path_factory.mktemp("right"), golden("dual"), "right.safetensors")
    with Engine.from_pretrained(DATA / "dual" / "model", adapter=right, device="cpu") as engine:
        yield engine


@pytest.mark.parametrize(
    ("change", "match"), WRONG_FOR_THE_ENGINE.values(), ids=WRONG_FOR_THE_ENGINE
)
def test_the_engine_refuses_and_keeps_what_it_has(
    tmp_path: Path, engine: Engine, change: Change, match: str
) -> None:
    tensors = golden("dual")
    change(tensors)
    path = saved(tmp_path, tensors)
    refusal(lambda: engine.load_adapter(path), match)
    assert engine.adapters == ["right"]
    assert engine.active_adapter == "right"


def test_from_pretrained_refuses_an_adapter_of_another_base(tmp_path: Path) -> None:
    path = saved(tmp_path, PLAIN)
    refusal(
        lambda: Engine.from_pretrained(DATA / "dual" / "model", adapter=path, device="cpu"),
        r"has \(channels, context width\) \(4, 4\), the base has",
    )


def test_a_wrong_adapter_is_refused_before_the_base_is_looked_for(tmp_path: Path) -> None:
    path = saved(tmp_path, {"w": torch.ones(1)})
    refusal(
        lambda: Engine.from_pretrained(tmp_path / "no-base", adapter=path, device="cpu"),
        f"^w {OURS_NOT}$",
    )


def test_an_adapter_that_overflows_when_folded_is_refused(tmp_path: Path) -> None:
    """Finite in the file, infinite in the engine: it drew black pairs."""
    tensors = {name: x.float() * 1e30 for name, x in golden("dual").items()}
    path = saved(tmp_path, tensors)
    engine = golden_engine("dual")
    before = engine.active_adapter
    with pytest.raises(AdapterError, match="is not finite once it is folded, in float32"):
        engine.load_adapter(path, "huge")
    assert engine.adapters == [before]
    assert len(engine.generate(seeds=[1], steps=1, size=64)) == 1
