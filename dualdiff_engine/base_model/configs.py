"""Bounds of the values in a base model's configuration files, checked before anything is built.

Only values that are listed here are handed on to diffusers and transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualdiff_engine.base_model.folder import read_json
from dualdiff_engine.errors import BaseModelError
from dualdiff_engine.model.config import MAX_LAYERS, MAX_LEVELS, MAX_WIDTH, UNetConfig

# (what is expected, whether a value is that)
Rule = tuple[str, Callable[[Any], bool]]


def _whole(least: int, most: int) -> Rule:
    return (
        f"a whole number from {least} to {most}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _between(low: float, high: float) -> Rule:
    return (
        f"a number between {low:g} and {high:g}",
        # `True` is an int in Python, but not a number of a configuration
        lambda value: type(value) in (int, float) and low < value < high,
    )


def _one_of(*values: object) -> Rule:
    return (
        " or ".join(repr(value) for value in values),
        lambda value: any(type(value) is type(v) and value == v for v in values),
    )


def _list_of(rule: Rule, most: int) -> Rule:
    def fits(value: Any) -> bool:
        return isinstance(value, list) and 1 <= len(value) <= most and all(map(rule[1], value))

    return f"a list of 1 to {most}, each {rule[0]}", fits


_TRUTH = _one_of(True, False)
_COUNT = _whole(1, MAX_WIDTH)
_ACTIVATION = _one_of("quick_gelu", "gelu", "gelu_new", "relu", "silu", "swish")

# value -> (rule, what it is where the file does not say)
_TEXT: dict[str, tuple[Rule, Any]] = {
    "vocab_size": (_whole(3, 1 << 20), 49408),
    "hidden_size": (_COUNT, 512),
    "intermediate_size": (_whole(1, 8 * MAX_WIDTH), 2048),
    "num_hidden_layers": (_whole(1, 128), 12),
    "num_attention_heads": (_COUNT, 8),
    "max_position_embeddings": (_whole(3, 4096), 77),
    "hidden_act": (_ACTIVATION, "quick_gelu"),
    "layer_norm_eps": (_between(0, 0.1), 1e-5),
}
_VAE: dict[str, tuple[Rule, Any]] = {
    "in_channels": (_one_of(3), 3),
    "out_channels": (_one_of(3), 3),
    "latent_channels": (_one_of(4), 4),
    "block_out_channels": (_list_of(_COUNT, MAX_LEVELS), [64]),
    "down_block_types": (
        _list_of(_one_of("DownEncoderBlock2D"), MAX_LEVELS),
        ["DownEncoderBlock2D"],
    ),
    "up_block_types": (_list_of(_one_of("UpDecoderBlock2D"), MAX_LEVELS), ["UpDecoderBlock2D"]),
    "layers_per_block": (_whole(1, MAX_LAYERS), 1),
    "act_fn": (_one_of("silu", "swish"), "silu"),
    "norm_num_groups": (_COUNT, 32),
    "scaling_factor": (_between(0, 1000), 0.18215),
    "shift_factor": (_one_of(None), None),
    "latents_mean": (_one_of(None), None),
    "latents_std": (_one_of(None), None),
    "use_quant_conv": (_TRUTH, True),
    "use_post_quant_conv": (_TRUTH, True),
    "mid_block_add_attention": (_TRUTH, True),
}
MAX_TRAIN_TIMESTEPS = 10_000
_SCHEDULER: dict[str, Rule] = {
    "num_train_timesteps": _whole(2, MAX_TRAIN_TIMESTEPS),
    "beta_start": _between(0, 1),
    "beta_end": _between(0, 1),
    "beta_schedule": _one_of("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": _one_of("epsilon", "v_prediction", "sample"),
    "timestep_spacing": _one_of("leading", "trailing", "linspace"),
    "steps_offset": _whole(0, MAX_TRAIN_TIMESTEPS),
}


def _require(where: object, name: str, value: object, rule: Rule) -> None:
    expected, fits = rule
    if not fits(value):
        raise BaseModelError(
            f"{where}: {name} = {str(value)[:80]!r} is not supported (expected {expected}): use "
            "the configuration that belongs to the model"
        )


def _read(
    where: object, config: Mapping[str, Any], rules: Mapping[str, tuple[Rule, Any]]
) -> dict[str, Any]:
    chosen = {name: config.get(name, default) for name, (_, default) in rules.items()}
    for name, value in chosen.items():
        _require(where, name, value, rules[name][0])
    return chosen


def text_values(path: Path, context_width: int) -> dict[str, Any]:
    """What shapes the text encoder, of its config.json. Raises BaseModelError.

    context_width: of the UNet that reads its output.
    """
    where, config = path, read_json(path)
    _require(
        where, "model_type", config.get("model_type"), _one_of("clip_text_model", "clip", None)
    )
    if config.get("model_type") == "clip":
        inner = config.get("text_config")
        config = inner if isinstance(inner, dict) else {}
    values = _read(where, config, _TEXT)
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if width % heads:
        raise BaseModelError(f"{where}: hidden_size {width} is not a multiple of {heads} heads")
    if width != context_width:
        raise BaseModelError(
            f"{where}: hidden_size {width} differs from the UNet's cross_attention_dim "
            f"{context_width}: use the text encoder of the same model"
        )
    return values


def vae_values(path: Path) -> dict[str, Any]:
    """What shapes the VAE, of its config.json. Raises BaseModelError."""
    where, config = path, read_json(path)
    _require(where, "_class_name", config.get("_class_name"), _one_of("AutoencoderKL", None))
    values = _read(where, config, _VAE)
    channels, groups = values["block_out_channels"], values["norm_num_groups"]
    levels = {len(values[name]) for name in ("down_block_types", "up_block_types")}
    if levels != {len(channels)}:
        raise BaseModelError(f"{where}: block types and block_out_channels differ in length")
    if any(width % groups for width in channels):
        raise BaseModelError(
            f"{where}: block_out_channels {channels} are not multiples of norm_num_groups {groups}"
        )
    return values


def unet_values(config: UNetConfig) -> dict[str, Any]:
    """The same network for diffusers' UNet2DConditionModel."""
    down = {True: "CrossAttnDownBlock2D", False: "DownBlock2D"}
    up = {True: "CrossAttnUpBlock2D", False: "UpBlock2D"}
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.channels,
        "layers_per_block": config.layers,
        "transformer_layers_per_block": config.transformer_layers,
        # counts heads, see `UNetConfig`
        "attention_head_dim": config.heads,
        "down_block_types": tuple(down[attends] for attends in config.down_attention),
        "up_block_types": tuple(up[attends] for attends in config.up_attention),
        "cross_attention_dim": config.context_width,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
        "flip_sin_to_cos": config.flip_sin_to_cos,
        "freq_shift": config.freq_shift,
        "use_linear_projection": config.linear_projection,
    }


def check_scheduler(where: object, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuse values that no diffusion model was trained with. Raises BaseModelError.

    defaults: of what diffusers' schedulers read.
    """
    for name in config.keys() & defaults.keys():
        if name in _SCHEDULER:
            _require(where, name, config[name], _SCHEDULER[name])
        elif isinstance(defaults[name], bool):
            _require(where, name, config[name], _TRUTH)
        elif isinstance(defaults[name], float) and config[name] is not None:
            _require(where, name, config[name], _between(-1e6, 1e6))
    betas = config.get("trained_betas")
    if betas is not None:
        _require(where, "trained_betas", betas, _list_of(_between(0, 1), MAX_TRAIN_TIMESTEPS))
        if len(betas) != config.get("num_train_timesteps", 1000):
            raise BaseModelError(
                f"{where}: {len(betas)} trained_betas do not match num_train_timesteps"
            )


def sample_size_of(where: object, value: Any) -> tuple[int, int]:
    """(height, width) of the latents that a UNet was trained on; 64 x 64 where it does not say."""
    side = _whole(1, 1024)
    if value is None:
        return 64, 64
    if side[1](value):
        return value, value
    if isinstance(value, list) and len(value) == 2 and all(map(side[1], value)):
        return value[0], value[1]
    raise BaseModelError(
        f"{where}: sample_size = {str(value)[:80]!r} is not supported (expected "
        f"{side[0]}, or [height, width])"
    )


def token_limit(where: object, value: Any, positions: int) -> int:
    """Tokens of a prompt: what the tokenizer says, at most the text encoder's positions."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 3:
        raise BaseModelError(
            f"{where}: model_max_length = {str(value)[:80]!r} is not a "
            f"number of tokens: set it to {positions}"
        )
    return int(min(value, positions))
