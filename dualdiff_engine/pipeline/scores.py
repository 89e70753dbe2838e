"""What a pair is worth before a detector sees it: scores of its mask, and which scores will do.

With a placement the normal picture is known, so the change that the drawing made is known too: the
largest channel of |image - normal|, where normal is the picture as the autoencoder rebuilds it, so
that blur of the autoencoder does not count as a defect.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.pipeline.masks import MaskResult, extract_mask
from dualdiff_engine.pipeline.regions import RegionStatistics
from dualdiff_engine.settings import whole_number

Bytes = NDArray[np.uint8]
Flags = NDArray[np.bool_]
MaskSource = Literal["anomaly", "change", "both"]
MASK_SOURCES = ("anomaly", "change", "both")

# scores by what they need to be known
ALWAYS = ("area", "branch_difference")
WITH_PLACEMENT = ("change_inside", "change_outside", "change_share", "area_ratio")
SCORES = (*ALWAYS, *WITH_PLACEMENT)

# a change that can be seen, in grey levels of full scale
VISIBLE = 10 / 255
# a mask that is not empty, on a change that can be seen, of which the mask holds a third
DEFAULT_ACCEPT: Mapping[str, float] = {
    "min_area": 1e-4,
    "min_change_inside": VISIBLE,
    "min_change_share": 1 / 3,
}
DEFAULT_ATTEMPTS, MOST_ATTEMPTS = 4, 64
# of the longer side: one latent pixel of SD-1.5 at 512, as wide as a decoder smears an edge
MARGIN = 1 / 64


def check_mask_source(source: str, *, placed: bool) -> MaskSource:
    """Raises SettingsError for an unknown source, or one that needs a placement without one."""
    if source not in MASK_SOURCES:
        raise SettingsError(f"mask must be one of {', '.join(MASK_SOURCES)}, got {source!r}")
    if source != "anomaly" and not placed:
        raise SettingsError(f"mask {source!r} needs a placement: the normal picture is compared")
    return source  # type: ignore[return-value]


def cut_to_change(anomaly: MaskResult, change: Bytes | None, source: MaskSource) -> MaskResult:
    """The mask of a pair by its source.

    anomaly: the mask of the anomaly picture. change: |image - normal|, uint8 [H, W, 3]. `change`:
    the mask of the change, found as in an anomaly picture. `both`: that of the anomaly picture,
    without what lies more than a margin of 1/64 of the side beside the change.
    """
    if source == "anomaly" or change is None:
        return anomaly
    changed = extract_mask(change)
    if source == "change":
        return changed
    mask = np.where(_grown(changed.mask > 0), anomaly.mask, np.uint8(0))
    pixels = int(np.count_nonzero(mask))
    return MaskResult(mask, anomaly.threshold, pixels / mask.size, pixels == 0)


def scores_of(
    image: Bytes,
    anomaly: Bytes,
    mask: Bytes,
    change: Bytes | None = None,
    statistics: RegionStatistics | None = None,
    share: float = 1.0,
) -> dict[str, float | None]:
    """The scores of a pair, JSON-ready; None where one cannot be known.

    Args:
        image, anomaly: uint8 [H, W, 3].
        mask: uint8 [H, W].
        change: |image - normal|, uint8 [H, W, 3], where there is a normal picture.
        statistics: of real masks, where they are known.
        share: of the picture that these pixels are: less than 1 in a window.

    Returns:
        area: share of the picture in the mask. branch_difference: mean |image - anomaly| in the
        mask. change_inside: mean change in the mask. change_outside: mean change outside the mask
        and a margin of 1/64 of the side. change_share: of the change of all pixels that changed by
        10 of 255 levels or more, the share in the mask and the margin. area_ratio: the mask's area
        over the mean of real masks. All but the last are in [0, 1].
    """
    white = mask > 0
    found: dict[str, float | None] = dict.fromkeys(SCORES)
    found["area"] = float(white.mean())
    if white.any():
        difference = np.abs(image[white].astype(np.int16) - anomaly[white])
        found["branch_difference"] = float(difference.mean()) / 255
    if change is not None:
        amount = change.max(axis=2).astype(np.float64) / 255
        near, visible = _grown(white), np.where(amount >= VISIBLE, amount, 0)
        total = float(visible.sum())
        found["change_inside"] = float(amount[white].mean()) if white.any() else None
        found["change_outside"] = float(amount[~near].mean()) if not near.all() else None
        found["change_share"] = float(visible[near].sum()) / total if total else None
    if statistics is not None:
        usual = sum(area for area, _ in statistics.parts) / len(statistics.counts)
        found["area_ratio"] = float(white.mean()) * share / usual
    return found


def _grown(mask: Flags) -> Flags:
    margin = max(round(MARGIN * max(mask.shape)), 1)
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


@dataclass(frozen=True)
class Acceptance:
    """Which pairs are good, and how often a pair is drawn at most to become one.

    bounds: `min_` or `max_` and the name of a score -> its limit.
    """

    bounds: Mapping[str, float]
    attempts: int

    @classmethod
    def of(cls, accept: Any, attempts: Any, *, placed: bool) -> Acceptance | None:
        """Checked; None of None. Raises SettingsError.

        accept: "default" or bounds. attempts: 1 to 64; None: 4. placed: whether the pairs have
        placements; without, the default asks only for what is known.
        """
        if accept is None:
            if attempts is not None:
                raise SettingsError("attempts needs accept: say which pairs are good")
            return None
        number = DEFAULT_ATTEMPTS if attempts is None else whole_number(attempts)
        if number is None or not 1 <= number <= MOST_ATTEMPTS:
            raise SettingsError(f"attempts must be from 1 to {MOST_ATTEMPTS}, got {attempts!r}")
        known = SCORES if placed else ALWAYS
        if isinstance(accept, str) and accept == "default":
            default = {name: v for name, v in DEFAULT_ACCEPT.items() if name[4:] in known}
            return cls(default, number)
        return cls(_checked(accept, known), number)

    def record(self) -> dict[str, float]:
        """For a recipe."""
        return {**self.bounds, "attempts": self.attempts}

    def missed(self, scores: Mapping[str, float | None]) -> tuple[str, ...]:
        """The bounds that a pair does not keep.

        An empty mask keeps no `min_` bound; else what is not known keeps every bound.
        """
        return tuple(name for name in self.bounds if not self._kept(name, scores))

    def _kept(self, name: str, scores: Mapping[str, float | None]) -> bool:
        value, limit = scores[name[4:]], self.bounds[name]
        if name.startswith("min_"):
            return bool(scores["area"]) if value is None else value >= limit
        return value is None or value <= limit


def _checked(accept: Any, known: Sequence[str]) -> dict[str, float]:
    if not isinstance(accept, Mapping) or not accept:
        raise SettingsError(f"accept must be 'default' or a dict of bounds, got {accept!r}")
    for name, value in accept.items():
        if not isinstance(name, str) or name[:4] not in ("min_", "max_") or name[4:] not in SCORES:
            raise SettingsError(
                f"accept has no bound {name!r}: use min_ or max_ and one of {', '.join(SCORES)}"
            )
        if name[4:] not in known:
            raise SettingsError(f"accept {name!r} needs a placement: pass one, or leave it out")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise SettingsError(f"accept {name!r} must be a finite number, got {value!r}")
    return {name: float(value) for name, value in accept.items()}


def attempt_seed(seed: int, attempt: int) -> int:
    """The seed of a pair's noise in an attempt: its own in the first (0), then from a hash."""
    if attempt == 0:
        return seed
    mixed = hashlib.sha256(f"{seed} attempt {attempt}".encode()).digest()
    return int.from_bytes(mixed[:8], "big") >> 1
