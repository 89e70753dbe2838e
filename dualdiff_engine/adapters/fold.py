"""Named tensors -> folded tensors of DualUNet. Pure algebra, in fp64, once per adapter.

Nothing is ever subtracted: every adapter is folded anew from the pristine base. Names on the left
are diffusers' and the released adapter's, on the right those of `dualdiff_engine.model`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dualdiff_engine.adapters.format import (
    PROJECTIONS,
    AdapterSummary,
    BackgroundBlend,
    LowRank,
    SiteAdapter,
)
from dualdiff_engine.errors import AdapterError
from dualdiff_engine.exchanges import of_kind
from dualdiff_engine.settings import Prompts

Tensors = Mapping[str, Tensor]

_RENAMES = (
    ("down_blocks.", "down_levels."),
    ("mid_block.", "middle."),
    ("up_blocks.", "up_levels."),
    ("downsamplers.0.conv.", "resample."),
    ("upsamplers.0.conv.", "resample."),
    (".ff.net.0.proj.", ".ff_in."),
    (".ff.net.2.", ".ff_out."),
    ("time_embedding.linear_", "time_linear_"),
    ("conv_norm_out.", "norm_out."),
)
_SITE = re.compile(r"\.attn[12]\.")
_SITE_PARTS = {
    "q": "to_q.weight",
    "k": "to_k.weight",
    "v": "to_v.weight",
    "out": "to_out.0.weight",
    "bias": "to_out.0.bias",
}
_TIME_PART = re.compile(r"(.+\.resnets\.\d+)\.(time_emb_proj\.(weight|bias)|conv1\.bias)")


@dataclass(frozen=True)
class Resident:
    """A folded adapter, ready to be pointed at.

    prompts: what is drawn when a caller names none; the released ones, or those that a bundle
    recorded.
    """

    summary: AdapterSummary
    sites: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    prompts: Prompts = field(default_factory=Prompts)


def engine_name(diffusers_name: str) -> str:
    """Where the network keeps a tensor (or module) of a diffusers UNet."""
    for theirs, ours in _RENAMES:
        diffusers_name = diffusers_name.replace(theirs, ours)
    return diffusers_name


def diffusers_name(engine_name: str) -> str:
    """The inverse of `engine_name`, for what has one."""
    if engine_name.startswith("up_levels."):
        engine_name = engine_name.replace("resample.", "upsamplers.0.conv.")
    for theirs, ours in _RENAMES:
        engine_name = engine_name.replace(ours, theirs)
    return engine_name


def _resnet_order(name: str) -> tuple[int, list[int]]:
    stage = ("down_blocks", "mid_block", "up_blocks").index(name.split(".", 1)[0])
    return stage, [int(n) for n in re.findall(r"\d+", name)]


def fold_network(base: Tensors, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that no adapter touches: convolutions, norms, feed-forwards, the time table.

    base: a diffusers UNet's tensors. The time projections of all resnets are stacked into one
    table, each joined by the bias of the convolution that its output is added to.
    """
    folded: dict[str, Tensor] = {}
    resnets: set[str] = set()
    for name in base:
        if _SITE.search(name):
            continue
        if match := _TIME_PART.fullmatch(name):
            resnets.add(match[1])
            continue
        tensor = base[name]
        if ".proj_in.weight" in name or ".proj_out.weight" in name:
            # SD-1.x keeps these as 1x1 convolutions, SD-2.x as linear layers
            tensor = tensor.flatten(1)
        tensor = tensor.to(device, dtype)
        if tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        folded[engine_name(name)] = tensor
    ordered = sorted(resnets, key=_resnet_order)
    weights = [base[f"{name}.time_emb_proj.weight"] for name in ordered]
    biases = [
        base[f"{name}.time_emb_proj.bias"].double() + base[f"{name}.conv1.bias"].double()
        for name in ordered
    ]
    folded["time_table.weight"] = torch.cat(weights).to(device, dtype)
    folded["time_table.bias"] = torch.cat(biases).to(device, dtype)
    return folded


def fold_sites(
    base: Tensors,
    sites: Mapping[str, SiteAdapter] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Everything an adapter touches, with the LoRA of both branches merged.

    sites: of an `Adapter`; None folds the plain, one-branch network. Raises AdapterError when a
    folded tensor is not finite in the dtype.
    """
    folded: dict[str, Tensor] = {}
    for name in sorted(n.removesuffix(".to_q.weight") for n in base if n.endswith(".to_q.weight")):
        own = {
            part: base[f"{name}.{key}"].to(device, torch.float64)
            for part, key in _SITE_PARTS.items()
        }
        fold = fold_self_site if name.endswith("attn1") else fold_text_site
        for part, tensor in fold(own, sites[name] if sites else None).items():
            folded[f"{engine_name(name)}.{part}"] = _rounded(f"{name}: {part}", tensor, dtype)
    return folded


def _rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A folded tensor in the engine's dtype. Raises AdapterError when it is not finite there."""
    rounded = tensor.to(dtype).contiguous()
    # either is NaN where one value is
    if not all(bool(torch.isfinite(x)) for x in torch.aminmax(rounded)):
        short = str(dtype).removeprefix("torch.")
        raise AdapterError(
            f"{name} is not finite once it is folded, in {short}: the adapter's values are too "
            "large; use float32, or an earlier checkpoint"
        )
    return rounded


def fold_self_site(base: Tensors, site: SiteAdapter | None) -> dict[str, Tensor]:
    """A self-attention site in fp64; base: its q, k, v, out, bias. Queries, keys, values packed."""
    merged = _merge_lora(base, site)
    folded = {"qkv_weight": torch.cat([merged["q"], merged["k"], merged["v"]], dim=1)}
    if site is not None and site.background is not None:
        folded |= fold_background(site.background, merged["k"][0], merged["v"][0])
    return folded | _fold_output(base, merged, site)


def fold_text_site(base: Tensors, site: SiteAdapter | None) -> dict[str, Tensor]:
    """A text-attention site in fp64; base: its q, k, v, out, bias. Keys and values packed."""
    merged = _merge_lora(base, site)
    folded = {"q_weight": merged["q"], "kv_weight": torch.cat([merged["k"], merged["v"]], dim=1)}
    if site is not None and site.scale is not None:
        folded["align_scale"] = site.scale.to(base["q"])
    return folded | _fold_output(base, merged, site)


def _merge(weight: Tensor, lora: LowRank) -> Tensor:
    """W + up @ down in fp64. The released adapters carry no alpha: the scale is 1."""
    weight = weight.double()
    return torch.addmm(weight, lora.up.to(weight), lora.down.to(weight))


def _merge_lora(base: Tensors, site: SiteAdapter | None) -> dict[str, Tensor]:
    """W + up @ down per branch: {q, k, v, out: [F, out, in]}."""
    if site is None:
        return {part: base[part][None] for part in PROJECTIONS}
    return {
        part: torch.stack([_merge(base[part], branch[part]) for branch in site.lora])
        for part in PROJECTIONS
    }


def _fold_output(base: Tensors, merged: Tensors, site: SiteAdapter | None) -> dict[str, Tensor]:
    exchange = of_kind(site.exchange).fold(site.parts, base["q"]) if site is not None else {}
    return {"out_weight": merged["out"], "out_bias": base["bias"], **exchange}


def fold_background(blend: BackgroundBlend, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """The image branch's K and V from a blended context, split into its own and a constant share.

    K ((1 - a) h + a (P_2 (P_1 h_bg + c_1) + c_2)) = (1 - a) K h + (D h_bg + e). The factor 1 - a is
    kept apart: the background pass needs the same K and V without it.
    """
    amount = blend.amount.to(key)
    reduce = blend.reduce.weight.to(key), blend.reduce.bias.to(key)
    expand = blend.expand.weight.to(key), blend.expand.bias.to(key)
    read = amount * torch.cat([key, value])
    return {
        "background_keep": 1 - amount,
        "background_weight": read @ expand[0] @ reduce[0],
        "background_bias": read @ (expand[0] @ reduce[1] + expand[1]),
    }


_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def fold_text_encoder(
    base: Tensors, layers: Mapping[str, Mapping[str, LowRank]]
) -> dict[str, Tensor]:
    """The text encoder's weights that an adapter changes, under the encoder's own names."""
    folded = {}
    for layer, pairs in layers.items():
        for part, lora in pairs.items():
            name = f"{layer}.{_TEXT_PROJECTIONS[part]}.weight"
            folded[name] = _merge(base[name], lora).to(base[name].dtype)
    return folded
