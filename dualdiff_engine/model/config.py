"""The part of a diffusers `unet/config.json` that shapes the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dualdiff_engine.errors import BaseModelError

# anything else in these fields is another family (SDXL, inpainting variants, class-conditional…)
_REQUIRED: dict[str, tuple[object, ...]] = {
    "_class_name": ("UNet2DConditionModel", None),
    "act_fn": ("silu", None),
    "addition_embed_type": (None,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "resnet_time_scale_shift": ("default", None),
    "resnet_skip_time_act": (False, None),
    "resnet_out_scale_factor": (1.0, None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", None),
    "mid_block_scale_factor": (1, None),
    "mid_block_only_cross_attention": (None, False),
    "only_cross_attention": (False, None),
    "dual_cross_attention": (False, None),
    "cross_attention_norm": (None,),
    "attention_type": ("default", None),
    "center_input_sample": (False, None),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "downsample_padding": (1, None),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "dropout": (0.0, None),
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}

# well above SD-2.x, which has 4 levels, 2 or 3 layers, 1280 channels: what is larger is a mistake,
# and would fill the memory before the weights show it
MAX_LEVELS, MAX_LAYERS, MAX_WIDTH = 8, 32, 8192


def _per_level(value: Any, levels: int, name: str, most: int = MAX_WIDTH) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * levels
    # `True` is an int in Python, but not a number of a configuration
    if len(values) != levels or not all(type(v) is int and 0 < v <= most for v in values):
        raise BaseModelError(
            f"unet config: {name} = {_short(value)} does not give {levels} whole numbers from 1 "
            f"to {most}"
        )
    return values


def _short(value: object) -> str:
    return repr(value)[:80]


def _number(config: Mapping[str, Any], name: str, default: float, low: float, high: float) -> Any:
    value = config.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:
        raise BaseModelError(
            f"unet config: {name} = {_short(value)} is not a number from {low:g} to {high:g}"
        )
    return value


def _truth(config: Mapping[str, Any], name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise BaseModelError(f"unet config: {name} = {_short(value)} is neither true nor false")
    return value


@dataclass(frozen=True)
class UNetConfig:
    """Shape of an SD-1.x or SD-2.x UNet; per-level values go from the finest level down."""

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    layers: tuple[int, ...]
    transformer_layers: tuple[int, ...]
    heads: tuple[int, ...]
    down_attention: tuple[bool, ...]
    up_attention: tuple[bool, ...]
    context_width: int
    norm_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    linear_projection: bool

    @property
    def time_width(self) -> int:
        return 4 * self.channels[0]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a diffusers config. Raises BaseModelError naming the field that is not supported."""
        for name, allowed in _REQUIRED.items():
            if config.get(name, allowed[-1]) not in allowed:
                raise BaseModelError(
                    f"unet config: {name} = {_short(config[name])} is not an SD-1.x or SD-2.x UNet "
                    f"(expected {allowed[0]!r})"
                )
        try:
            return cls._read(config)
        except (KeyError, TypeError) as error:
            raise BaseModelError(
                f"unet config is incomplete or malformed: {_short(error)}"
            ) from error

    @classmethod
    def _read(cls, config: Mapping[str, Any]) -> UNetConfig:
        widths = config["block_out_channels"]
        if not isinstance(widths, list | tuple) or not 1 <= len(widths) <= MAX_LEVELS:
            raise BaseModelError(
                f"unet config: block_out_channels = {_short(widths)} is not a list of 1 to "
                f"{MAX_LEVELS} widths"
            )
        levels = len(widths)
        channels = _per_level(widths, levels, "block_out_channels")
        down, up = config["down_block_types"], config["up_block_types"]
        unknown = [t for t in down if t not in _DOWN] + [t for t in up if t not in _UP]
        if unknown or len(down) != levels or len(up) != levels:
            raise BaseModelError(
                f"unet config: block types {_short(down)} / {_short(up)} are not supported"
            )
        # "attention_head_dim" of these configs counts heads (kept so by diffusers for old files)
        heads = config.get("num_attention_heads") or config.get("attention_head_dim", 8)
        read = cls(
            in_channels=_per_level(config.get("in_channels", 4), 1, "in_channels")[0],
            out_channels=_per_level(config.get("out_channels", 4), 1, "out_channels")[0],
            channels=channels,
            layers=_per_level(
                config.get("layers_per_block", 2), levels, "layers_per_block", MAX_LAYERS
            ),
            transformer_layers=_per_level(
                config.get("transformer_layers_per_block", 1),
                levels,
                "transformer_layers_per_block",
                MAX_LAYERS,
            ),
            heads=_per_level(heads, levels, "attention_head_dim"),
            down_attention=tuple(_DOWN[t] for t in down),
            up_attention=tuple(_UP[t] for t in up),
            context_width=_per_level(config["cross_attention_dim"], 1, "cross_attention_dim")[0],
            norm_groups=_per_level(config.get("norm_num_groups", 32), 1, "norm_num_groups")[0],
            norm_eps=_number(config, "norm_eps", 1e-5, 1e-12, 0.1),
            flip_sin_to_cos=_truth(config, "flip_sin_to_cos", True),
            freq_shift=_number(config, "freq_shift", 0, 0, 1),
            linear_projection=_truth(config, "use_linear_projection", False),
        )
        read._check()
        return read

    def _check(self) -> None:
        """Raises BaseModelError where widths, groups and heads do not go together."""
        for width, heads in zip(self.channels, self.heads, strict=True):
            if width % self.norm_groups or width % heads or width % 2:
                raise BaseModelError(
                    f"unet config: block_out_channels {width} is not a multiple of 2, of "
                    f"norm_num_groups {self.norm_groups} and of {heads} heads"
                )
        if self.channels[0] // 2 == self.freq_shift:
            raise BaseModelError(f"unet config: {self.channels[0]} channels are too few")
