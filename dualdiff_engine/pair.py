"""What a caller gets: an image, its anomaly picture, its mask, and how they were made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dualdiff_engine.errors import SettingsError

OUTPUT_TYPES = ("pil", "np", "pt")


@dataclass(frozen=True)
class Pair:
    """One generated pair.

    image, anomaly: `pil` RGB; `np` float32 [H, W, 3] or `pt` float32 [3, H, W], both in [0, 1].
    mask: 255 on the anomaly, 0 elsewhere; `pil` mode L, `np` or `pt` uint8 [H, W].
    empty_mask: nothing was found in the anomaly picture. recipe: everything that makes the pair
    again, JSON-ready.
    """

    image: Any
    anomaly: Any
    mask: Any
    seed: int
    empty_mask: bool
    recipe: dict[str, Any] = field(repr=False)


def check_output_type(output_type: str) -> str:
    if output_type not in OUTPUT_TYPES:
        raise SettingsError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )
    return output_type


def to_uint8(picture: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> uint8 [H, W, 3], rounded to the nearest level."""
    return (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def present(picture: Tensor, output_type: str) -> Any:
    """[3, H, W] fp32 on the CPU as the output type asked for."""
    if output_type == "pil":
        return Image.fromarray(to_uint8(picture))
    return picture.permute(1, 2, 0).numpy() if output_type == "np" else picture


def present_mask(mask: np.ndarray, output_type: str) -> Any:
    """uint8 [H, W] as the output type asked for."""
    if output_type == "pil":
        return Image.fromarray(mask)
    return mask if output_type == "np" else torch.from_numpy(mask)
