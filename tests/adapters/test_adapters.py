"""What an adapter's tensors mean: complete ones parse, everything else is refused by its name."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapter_cases import (
    CHANNELS,
    LAYER,
    OURS_NOT,
    RANK,
    SELF,
    TEXT,
    Change,
    Spread,
    Tensors,
    add,
    both,
    drop,
    edit,
    extend,
    refusal,
    refused,
    rename,
    saved,
    tiny,
)
from dualdiff_engine import adapters

PLAIN, BACKGROUND = tiny(), tiny(background=True)
CHAINED = tiny(background=True, chained=True)
SELF_KEY, TEXT_KEY = f"unet.{SELF}.processor", f"unet.{TEXT}.processor"
LAYER_KEY = f"text_encoder.{LAYER}"


def poison(value: float) -> Spread:
    def spread(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return spread


def transpose(tensor: Tensor) -> Tensor:
    return tensor.mT


# --- every key on its own ------------------------------------------------------------------------


@pytest.mark.parametrize("tensors", [PLAIN, CHAINED], ids=["plain", "background"])
def test_every_missing_key_is_named(tmp_path: Path, tensors: Tensors) -> None:
    for name in tensors:
        rest = {key: tensor for key, tensor in tensors.items() if key != name}
        refused(saved(tmp_path, rest), f"^{re.escape(name)} is missing: .*use an intact copy")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_every_key_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    for name in CHAINED:
        poisoned = {**CHAINED, name: poison(value)(CHAINED[name])}
        refused(
            saved(tmp_path, poisoned),
            f"{re.escape(name)} holds NaN or infinity.*earlier checkpoint",
        )


@pytest.mark.parametrize("tensors", [PLAIN, CHAINED], ids=["plain", "background"])
@pytest.mark.parametrize(
    "spread",
    [lambda t: t[..., None], lambda t: t.reshape(-1) if t.dim() > 1 else t.reshape(1, -1)],
    ids=["one-axis-more", "flat"],
)
def test_every_key_with_other_axes_is_named(tensors: Tensors, spread: Spread) -> None:
    for name, tensor in tensors.items():
        changed = {**tensors, name: spread(tensor)}
        match = f"^{re.escape(name)} has shape .*expected .*intact copy"
        refusal(partial(adapters.parse, changed), match)


@pytest.mark.parametrize("axis", [0, -1], ids=["rows", "columns"])
def test_every_key_of_another_size_is_refused_at_its_module(axis: int) -> None:
    for name, tensor in CHAINED.items():
        module = re.escape(re.split(r"\.t(o|emporal)_", name)[0])
        changed = {**CHAINED, name: extend(axis)(tensor)}
        refusal(partial(adapters.parse, changed), f"^{module}[.:].*intact copy")


@pytest.mark.parametrize("name", ["w", f"{SELF_KEY}.extra", f"{LAYER_KEY}.extra"])
def test_one_more_key_is_named(tmp_path: Path, name: str) -> None:
    refused(
        saved(tmp_path, {**PLAIN, name: torch.ones(1)}),
        f"^{re.escape(name)} is not part of a DualAnoDiff adapter: remove it or retrain",
    )


# --- chosen mistakes -----------------------------------------------------------------------------

MISSING = "is missing: the adapter is incomplete; use an intact copy or another checkpoint"
FOREIGN = "not a two-branch DualAnoDiff adapter: pass an adapter trained with DualAnoDiff"
UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0"

# tensors, what is done to them, the refusal
MISTAKES: dict[str, tuple[Tensors, Change, str]] = {
    "branch-1-of-q": (PLAIN, drop(r"attn1.*q_lora\.1"), rf"attn1.*q_lora.1.down.weight {MISSING}"),
    "branch-0-everywhere": (PLAIN, drop(r"_lora\.0\."), rf"to_q_lora.0.down.weight {MISSING}"),
    "branch-1-everywhere": (PLAIN, drop(r"_lora\.1\."), rf"to_q_lora.1.down.weight {MISSING}"),
    "all-up": (PLAIN, drop(r"unet.*\.up\."), rf"to_q_lora.0.up.weight {MISSING}"),
    "all-down": (PLAIN, drop(r"unet.*\.down\.w"), rf"to_q_lora.0.down.weight {MISSING}"),
    "no-interaction": (PLAIN, drop("temporal"), rf"temporal_n.weight {MISSING}"),
    "no-lora": (PLAIN, drop(r"unet.*_lora"), rf"to_q_lora.0.down.weight {MISSING}"),
    "no-norm": (PLAIN, drop("attn2.*temporal_n"), rf"attn2.processor.temporal_n.weight {MISSING}"),
    "no-bias": (PLAIN, drop(r"temporal_.\.bias"), rf"temporal_n.bias {MISSING}"),
    "no-unet": (PLAIN, drop("unet"), f"{LAYER_KEY}.*no UNet attention weights found; .*pass an ad"),
    "text-half": (PLAIN, drop(r"text_enc.*\.up"), rf"{LAYER_KEY}.to_q_lora.up.weight {MISSING}"),
    "text-without-v": (PLAIN, drop("text_enc.*to_v"), f"{LAYER_KEY}.to_v_lora.down.w.* {MISSING}"),
    "down-rank": (
        PLAIN, edit("attn1.*q_lora.0.down", extend(0)),
        r"attn1.processor.to_q_lora.0.up.weight has shape \[4, 2\], expected \[4, 3\].*intact copy",
    ),
    "up-rank": (
        PLAIN, edit("attn1.*q_lora.0.up", extend(1)),
        r"attn1.processor.to_q_lora.0.up.weight has shape \[4, 3\], expected \[4, 2\].*intact copy",
    ),
    "mixed-ranks": (
        PLAIN,
        both(
            edit(r"attn2.*v_lora\.1\.down", extend(0)), edit(r"attn2.*v_lora\.1\.up", extend(1))
        ),
        rf"^{TEXT_KEY}.to_v_lora.1.down.weight has rank 3, the others have rank 2: .*intact copy",
    ),
    "mixed-ranks-of-branches": (
        PLAIN,
        both(edit(r"k_lora\.0\.down", extend(0)), edit(r"k_lora\.0\.up", extend(1))),
        r"to_k_lora.0.down.weight has rank 3, the others have rank 2",
    ),
    "mixed-text-ranks": (
        PLAIN,
        both(edit(r"text.*k_lora\.down", extend(0)), edit(r"text.*k_lora\.up", extend(1))),
        f"^{LAYER_KEY}.to_k_lora.down.weight has rank 3, the others have rank 2",
    ),
    "transposed-down": (
        PLAIN, edit("attn1.*to_k_lora.0.down", transpose),
        r"to_k_lora.0.down.weight has shape \[4, 2\], expected \['any', 4\]",
    ),
    "transposed-up": (
        PLAIN, edit("attn1.*to_k_lora.0.up", transpose),
        r"to_k_lora.0.up.weight has shape \[2, 4\], expected \[4, 2\]",
    ),
    "transposed-text": (
        PLAIN, edit("text_enc.*to_out_lora.down", transpose),
        r"to_out_lora.down.weight has shape \[6, 2\], expected \['any', 6\]",
    ),
    "swapped-halves": (
        PLAIN,
        both(rename(r"\.down\.", ".x."), rename(r"\.up\.", ".down."), rename(r"\.x\.", ".up.")),
        "has shape .*expected .*intact copy",
    ),
    "vector-for-matrix": (
        PLAIN, edit("attn1.*to_out_lora.1.up", torch.Tensor.flatten),
        r"to_out_lora.1.up.weight has shape \[8\], expected \[4, 2\]",
    ),
    "convolution": (
        PLAIN, edit("attn1.*to_q_lora.1.down", lambda t: t[:, :, None, None]),
        r"to_q_lora.1.down.weight has shape \[2, 4, 1, 1\], expected \['any', 4\]",
    ),
    "matrix-for-norm": (
        PLAIN, edit("attn1.*temporal_n.weight", torch.diag),
        r"temporal_n.weight has shape \[4, 4\], expected \['any'\]",
    ),
    "norm-of-other-width": (
        PLAIN, edit("attn1.*temporal_n", extend(0)), "attn1.*has shape .*, expected .*5"
    ),
    "k-and-v-disagree": (
        PLAIN, edit("attn2.*to_v_lora.*down", extend(1)),
        rf"^{TEXT_KEY}: k and v have different input widths \[6, 7\]: .*intact copy",
    ),
    "branches-disagree": (
        PLAIN, edit(r"attn2.*to_[kv]_lora\.1\.down", extend(1)),
        "k and v have different input widths",
    ),
    "third-branch": (
        PLAIN, add(f"{SELF_KEY}.to_q_lora.2.down.weight", RANK, CHANNELS), rf"q_lora.2.*{OURS_NOT}"
    ),
    "bias-on-lora": (PLAIN, add(f"{SELF_KEY}.to_q_lora.0.up.bias", 4), f"up.bias {OURS_NOT}"),
    "unknown-part": (PLAIN, add(f"{SELF_KEY}.temporal_z.weight", 4, 4), f"temporal_z.*{OURS_NOT}"),
    "third-mlp-step": (
        BACKGROUND, add(f"{SELF_KEY}.temporal_condition_mlp.2.weight", 4, 4), f"mlp.2.*{OURS_NOT}"
    ),
    "third-attention": (PLAIN, rename("attn2", "attn3"), f"attn3.*{OURS_NOT}"),
    "text-branch": (
        PLAIN, rename(r"(text.*_lora)\.", r"\1.0."), f"{LAYER_KEY}.to_k_lora.0.down.w.*{OURS_NOT}"
    ),
    "upper-case": (PLAIN, rename("temporal_n", "Temporal_n"), f"Temporal_n.bias {OURS_NOT}"),
    "optimizer-state": (PLAIN, add("optimizer.state.0.exp_avg", 4), f"exp_avg {OURS_NOT}"),
    # background and spelling
    "chained-text-site": (
        CHAINED, rename("attn2.processor", "attn2.processor.chained_proc"),
        f"^{TEXT_KEY}.chained_proc: only self-attention .*remove `chained_proc.`",
    ),
    "chained-plain": (
        PLAIN, rename("attn1.processor", "attn1.processor.chained_proc"),
        f"^{SELF_KEY}.chained_proc: only self-attention of an adapter with background.*remove",
    ),
    "both-spellings": (
        CHAINED, add(f"{SELF_KEY}.temporal_a", 1),
        f"^{SELF_KEY}.temporal_a occurs twice, with and without chained_proc: keep one of them",
    ),
    "chained-twice": (
        CHAINED, rename("chained_proc", "chained_proc.chained_proc"), f"chained_proc.*{OURS_NOT}"
    ),
    "chained-elsewhere": (
        CHAINED, rename(r"processor\.chained_proc", "chained_proc.processor"), OURS_NOT
    ),
    "background-at-text-only": (
        BACKGROUND, drop("attn1.*(temporal_a|mlp)"),
        f"^{SELF_KEY}.temporal_condition_mlp.0.weight {MISSING}",
    ),
    "background-half-at-text": (
        BACKGROUND, drop("attn2.*mlp.1"), f"^{TEXT_KEY}.temporal_condition_mlp.1.weight {MISSING}"
    ),
    "no-amount-anywhere": (
        BACKGROUND, drop("temporal_a"), "condition_mlp.*but the file has no temporal_a"
    ),
    "no-mlp-anywhere": (BACKGROUND, drop("mlp"), f"temporal_condition_mlp.0.weight {MISSING}"),
    "amount-scalar": (
        BACKGROUND, edit("attn1.*temporal_a", torch.Tensor.squeeze),
        rf"^{SELF_KEY}.temporal_a has shape \[\], expected \[1\]",
    ),
    "amount-pair": (
        BACKGROUND, edit("attn1.*temporal_a", extend(0)), r"_a has shape \[2\], expected \[1\]"
    ),
    "amount-pair-at-text": (
        BACKGROUND, edit("attn2.*temporal_a", extend(0)), rf"{TEXT_KEY}.temporal_a has shape \[2\]"
    ),
    "mlp-narrow-on-one-side": (
        CHAINED, edit("attn1.*mlp.1.weight", extend(1)),
        r"chained_proc.temporal_condition_mlp.1.weight has shape \[4, 4\], expected \[4, 3\]",
    ),
    # other families
    "plain-diffusers": (PLAIN, rename(r"_lora\.[01]\.", "_lora."), f"one-branch.*{FOREIGN}"),
    "plain-diffusers-no-prefix": (
        PLAIN,
        both(drop("text_encoder"), rename(r"unet\.(.*_lora)\.[01]\.", r"\1.")),
        f"this is a plain, one-branch.*{FOREIGN}",
    ),
    "no-prefix": (PLAIN, rename("^unet.", ""), rf"^{SELF}.*{OURS_NOT}"),
    "wrong-prefix": (PLAIN, rename("^unet.", "model."), rf"^model.*{OURS_NOT}"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "change", "match"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_refused(tmp_path: Path, tensors: Tensors, change: Change, match: str) -> None:
    changed = dict(tensors)
    change(changed)
    refused(saved(tmp_path, changed), match, allow_pickle=False)


# one name as each family writes it
FAMILIES = {
    "kohya-unet": ("lora_unet_down_blocks_0_to_q.lora_down.weight", "a kohya-style LoRA"),
    "kohya-text": ("lora_te1_text_model_layers_0_q_proj.lora_up.weight", "a kohya-style LoRA"),
    "kohya-alpha": ("lora_unet_mid_block_attentions_0_to_q.alpha", "a kohya-style LoRA"),
    "peft-diffusers": (f"{UNET}.attn1.to_q.lora_A.weight", "a PEFT LoRA"),
    "peft-text": ("text_encoder.text_model.encoder.layers.0.q_proj.lora_B.weight", "a PEFT LoRA"),
    "peft-model": ("base_model.model.down_blocks.0.to_q.lora_A.default.weight", "a PEFT LoRA"),
    "peft-dora": (f"{UNET}.attn1.to_q.lora_magnitude_vector", "a PEFT LoRA"),
    "diffusers-unet": (f"{UNET}.attn1.to_q.lora.down.weight", "a one-branch diffusers LoRA"),
    "diffusers-text": (
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
        "a one-branch diffusers LoRA",
    ),
    "diffusers-old": (f"{UNET}.attn1.processor.to_q_lora.down.weight", "a plain, one-branch"),
    "sdxl-text": ("text_encoder_2.text_model.layers.0.x.lora_A.weight", "an SDXL or SD3 LoRA"),
    "sdxl-unet": (
        "unet.down_blocks.2.attentions.0.transformer_blocks.5.attn1.to_q.lora_A.weight",
        "a PEFT LoRA",
    ),
    "flux": (
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "a LoRA of a transformer model",
    ),
    "flux-kohya": ("lora_transformer_single_blocks_0.lora_down.weight", "a kohya-style LoRA"),
    "alpha": (f"{SELF_KEY}.to_q_lora.0.alpha", "a LoRA scaled by alpha"),
    "network-alpha": (f"{SELF_KEY}.to_q_lora.0.network_alpha", "a LoRA scaled by alpha"),
    "loha": ("mid_block.attentions.0.to_q.hada_w1_a", "a LyCORIS adapter"),
    "lokr": ("mid_block.attentions.0.to_q.lokr_w1", "a LyCORIS adapter"),
    "ldm-checkpoint": ("model.diffusion_model.input_blocks.0.0.weight", "a whole checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "family"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("company", ["alone", "among-ours"])
def test_other_families_are_told_apart(
    tmp_path: Path, name: str, family: str, company: str
) -> None:
    ours = PLAIN if company == "among-ours" else {}
    refused(
        saved(tmp_path, {**ours, name: torch.ones(RANK, CHANNELS)}),
        f"^{re.escape(name)}: this is {family}.*{FOREIGN}",
    )


@pytest.mark.parametrize(
    "name",
    [
        "emb_params",
        "image_proj.proj.weight",
        "control_model.input_hint_block.0.weight",
        f"{UNET}.attn1.to_q.weight",
        f"{UNET}.attn1.processor.to_k_custom_diffusion.weight",
    ],
    ids=["textual-inversion", "ip-adapter", "controlnet", "whole-unet", "custom-diffusion"],
)
def test_unknown_families_are_refused(tmp_path: Path, name: str) -> None:
    refused(saved(tmp_path, {name: torch.ones(4, 4)}), f"^{re.escape(name)} {OURS_NOT}")
