"""One generated pair: image, anomaly image, mask, and the recipe that reproduces it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import dualdiff_engine
from dualdiff_engine.errors import SettingsError
from dualdiff_engine.settings import ChosenSampling, Prompts

OUTPUT_TYPES = ("pil", "np", "pt")
_PER_PAIR = {"seed", "mask", "attempt", "window"}
# calls follow from the sampling; a preset is a name for values that the sampling holds
_CIRCUMSTANCES = {"versions", "device", "backends", "calls", "preset"}
# what pairs of one run may have of their own
_PICTURES = ("background", "placement")
_OLDER: Mapping[str, Any] = {
    "tf32": False,
    "placement": None,
    "mask_source": "anomaly",
    "accept": None,
}
PACKAGES = ("torch", "numpy", "diffusers", "transformers", "safetensors")


@dataclass(frozen=True)
class Pair:
    """One generated pair.

    Attributes:
        image: The defective picture. `pil`: RGB. `np`: float32 [H, W, 3] in [0, 1]. `pt`: float32
            [3, H, W] in [0, 1].
        anomaly: The defect alone on black, as `image`.
        mask: 255 on the defect, 0 elsewhere. `pil`: mode L. `np` or `pt`: uint8 [H, W].
        seed: Of the pair's noise.
        empty_mask: Whether the anomaly image shows no defect.
        full_mask: Whether the mask covers the whole picture, which no defect does.
        region: With a placement 255 where the defect was to go, as `mask`; else None.
        scores: What the mask is worth; see `pipeline.scores.scores_of`.
        accepted: Whether the scores are within the bounds of `accept`; None without bounds.
        missed: The bounds that they are not within.
        recipe: Everything needed to reproduce the pair, JSON-ready.
    """

    image: Any
    anomaly: Any
    mask: Any
    seed: int
    empty_mask: bool
    recipe: dict[str, Any] = field(repr=False)
    full_mask: bool = False
    region: Any = None
    scores: Mapping[str, float | None] = field(default_factory=dict)
    accepted: bool | None = None
    missed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """A pair that came out unusable.

    reason: what is wrong and what to try. recipe: what reproduces it.
    """

    seed: int
    reason: str
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


def present_bytes(pixels: np.ndarray, output_type: str) -> Any:
    """uint8 [H, W, 3] as the output type asked for."""
    if output_type == "pil":
        return Image.fromarray(pixels)
    levels = pixels.astype(np.float32) / 255
    return levels if output_type == "np" else torch.from_numpy(levels).permute(2, 0, 1)


def present_mask(mask: np.ndarray, output_type: str) -> Any:
    """uint8 [H, W] as the output type asked for."""
    if output_type == "pil":
        return Image.fromarray(mask)
    return mask if output_type == "np" else torch.from_numpy(mask)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {
        "dualdiff-engine": dualdiff_engine.__version__,
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


@dataclass(frozen=True)
class Facts:
    """What all pairs of an engine share: where they are drawn and with which weights.

    base, adapter: source and sha256 of each, and the guidance that the adapter holds. backends: op,
    or op@class -> backend. tf32: whether float32 products on a GPU were rounded to TF32.
    """

    base: Mapping[str, str]
    adapter: Mapping[str, Any]
    dtype: str
    device: str
    backends: Mapping[str, str]
    tf32: bool = False


def identity(recipe: Mapping[str, Any], *, pictures: bool = True) -> dict[str, str]:
    """Of every part of a recipe that tells runs apart, its JSON: not seeds and masks.

    Where files lay and what the machine offered is no difference: the weights' hashes count, and
    paths, versions, devices and backends do not. pictures: whether the hashes of normal pictures
    and regions count, which pairs of one run may have of their own.
    """
    # recipes of older versions do not say all
    recipe = {**_OLDER, **recipe}
    kept = {k: v for k, v in recipe.items() if k not in _PER_PAIR | _CIRCUMSTANCES}
    for part in _PICTURES if not pictures else ():
        settings = _settings(kept, part).items()
        kept[part] = [[k, v] for k, v in settings if not k.endswith("_sha256")]
    for part in ("base", "adapter"):
        kept[part] = _settings(kept, part).get("sha256")
    return {name: json.dumps(value, sort_keys=True) for name, value in kept.items()}


def _settings(recipe: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    """A part of a recipe that somebody may have edited."""
    value = recipe.get(part)
    return value if isinstance(value, Mapping) else {}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Names of what differs between two identities."""
    names = ours.keys() | theirs.keys()
    return sorted(name for name in names if ours.get(name) != theirs.get(name))


def describe(
    facts: Facts,
    sampling: ChosenSampling,
    prompts: Prompts,
    given: list[str],
    segmenter: str | Path | None,
    calls: int,
    *,
    preset: Mapping[str, str] | None,
    mask_source: str,
    accept: Mapping[str, float] | None,
) -> dict[str, Any]:
    """The part of a recipe that all pairs of a run share, JSON-ready: all but their pictures.

    given: names of the tensors that replaced a draw. calls: of the denoiser, per pair. preset: its
    name and its gate, as from `verdicts.of_run`. accept: as from `Acceptance.record`.
    """
    return {
        "base": dict(facts.base),
        "adapter": dict(facts.adapter),
        "sampling": sampling.recorded(),
        "calls": calls,
        "preset": dict(preset) if preset else None,
        "prompts": asdict(prompts),
        "dtype": facts.dtype,
        "device": facts.device,
        "backends": dict(facts.backends),
        "tf32": facts.tf32,
        "versions": versions(),
        "given": given,
        "segmenter": str(segmenter) if segmenter else None,
        "mask_source": mask_source,
        "accept": dict(accept) if accept else None,
    }
