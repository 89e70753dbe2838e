"""Measures of pairs that need no weights: agreement, masks, diversity, copies.

All distances are root mean squares over pixels and channels, in [0, 1], of pictures reduced to
64 x 64: they see pose, layout and colour, and are blind to noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualdiff_engine.evaluation.data import Bytes, Flags, Sample, reduced, reduced_mask

DISTANCE_SIZE = 64
# of the longer side: one latent pixel of SD-1.5 at 512, as wide as a decoder smears an edge
MARGIN = 1 / 64
# a picture this much closer to a training picture than those are to each other repeats it
COPY_RATIO = 0.5
_ROWS = 256


def measure(samples: Sequence[Sample], train: Sequence[Sample] = ()) -> dict[str, Any]:
    """All measures of the pairs of one defect.

    Memory grows by 50 KB per pair; the time of the pairwise distances grows by the square of their
    number.

    Args:
        samples: pairs of one defect.
        train: the real pictures that the adapter was trained on, to compare with.

    Returns:
        `pairs`, `train`, `agreement`, `masks`, `diversity` and `copies`, JSON-ready; None where
        something cannot be measured. Distances and shares are in [0, 1].
    """
    drawn, real = Reduced(samples), Reduced(train) if train else None
    return {
        "pairs": len(samples),
        "train": len(train) or None,
        "agreement": agreement(samples),
        "masks": masks(samples) | {"train": masks(train) if train else None},
        "diversity": diversity(drawn) | {"train": diversity(real) if real else None},
        "copies": copies(drawn, real) if real and len(train) > 1 else None,
    }


def agreement(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """Whether the branches draw one defect, at full size; None without anomaly pictures.

    difference_inside: mean over pairs of |image - anomaly| inside the mask, in [0, 1].
    difference_chance: the same with the anomaly picture of the pair before; agreement is what lies
    between. leakage_outside: mean over pairs of the largest channel of the anomaly picture outside
    the mask and a margin of 1/64 of the side. leakage_worst: the largest of these, and whose.
    """
    inside, chance, leakage = [], [], []
    before: Bytes | None = None
    for sample in samples:
        anomaly = sample.anomaly_pixels()
        if sample.anomaly is None or anomaly is None:
            return None
        image, mask = sample.pixels(), sample.flags()
        outside = ~_grown(mask)
        if outside.any():
            share = float(anomaly.max(axis=2)[outside].mean()) / 255
            leakage.append((share, sample.anomaly.name))
        if mask.any():
            inside.append(_difference(image, anomaly, mask))
            if before is not None and before.shape == image.shape:
                chance.append(_difference(image, before, mask))
        before = anomaly
    worst = max(leakage, default=None)
    return {
        "difference_inside": _mean(inside),
        "difference_chance": _mean(chance),
        "leakage_outside": _mean([share for share, _ in leakage]),
        "leakage_worst": {"value": worst[0], "name": worst[1]} if worst else None,
    }


def masks(samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether masks look like masks of a defect.

    empty: share of the samples. area: mean and quantiles of the share of the picture, of those
    that are not empty. parts: mean number of connected parts. off_object: mean share of the mask
    that lies outside the object, None where no object mask is known.
    """
    areas, parts, outside = [], [], []
    for sample in samples:
        mask = sample.flags()
        if not mask.any():
            continue
        areas.append(float(mask.mean()))
        parts.append(cv2.connectedComponents(mask.astype(np.uint8))[0] - 1)
        whole = sample.object_flags()
        if whole is not None:
            outside.append(float((mask & ~whole).sum() / mask.sum()))
    names = {"smallest": 0, "p05": 5, "median": 50, "p95": 95, "largest": 100}
    area = {n: float(np.percentile(areas, q)) for n, q in names.items()} if areas else {}
    return {
        "empty": 1 - len(areas) / len(samples),
        "area": {"mean": _mean(areas), **area},
        "parts": _mean(parts),
        "off_object": _mean(outside),
    }


class Reduced:
    """Pictures, the defects in them on black, and masks, at the size that distances are taken."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.names = [sample.image.name for sample in samples]
        size = DISTANCE_SIZE
        self.images = np.empty((len(samples), size, size, 3), np.uint8)
        self.defects = np.empty_like(self.images)
        self.masks = np.empty((len(samples), size, size), bool)
        for n, sample in enumerate(samples):
            pixels, mask = sample.pixels(), sample.flags()
            self.images[n] = reduced(pixels, size)
            self.defects[n] = reduced(np.where(mask[..., None], pixels, np.uint8(0)), size)
            self.masks[n] = reduced_mask(mask, size)

    def without(self, index: int) -> Reduced:
        """All but one of the samples."""
        rest = Reduced(())
        rest.names = self.names[:index] + self.names[index + 1 :]
        for name in ("images", "defects", "masks"):
            setattr(rest, name, np.delete(getattr(self, name), index, axis=0))
        return rest


def diversity(drawn: Reduced) -> dict[str, Any]:
    """Mean pairwise distance within the defect.

    image: of whole pictures. defect: of the pictures black outside their masks. mask: 1 - overlap
    (intersection over union) of the masks that are not empty. None for a single one.
    """
    marked = drawn.masks[drawn.masks.any(axis=(1, 2))].reshape(-1, DISTANCE_SIZE**2)
    flags = torch.from_numpy(marked).float()
    area = flags.sum(1)
    overlap = flags @ flags.T
    apart = 1 - overlap / (area[:, None] + area - overlap) if len(flags) else overlap
    count = len(flags)
    return {
        "image": _pairwise(drawn.images),
        "defect": _pairwise(drawn.defects),
        "mask": float(apart.sum() / (count * (count - 1))) if count > 1 else None,
    }


def copies(drawn: Reduced, train: Reduced) -> dict[str, Any]:
    """Whether pairs repeat training pictures, flipped ones included, as training flips them.

    For whole pictures (`image`) and for what their masks cut out (`defect`): `nearest`, the median
    distance to the nearest training picture; `nearest_train`, the same of training pictures to each
    other; `ratio` of the two, near 1 for pictures as new as real ones; `copies`, names of pairs
    whose own ratio is below 0.5. A shifted or rotated copy is not found.
    """
    return {
        "image": _repeated(drawn.images, train.images, drawn.names),
        "defect": _repeated(drawn.defects, train.defects, drawn.names),
    }


def _repeated(drawn: Bytes, train: Bytes, names: Sequence[str]) -> dict[str, Any]:
    flips = (train, train[:, :, ::-1], train[:, ::-1], train[:, ::-1, ::-1])
    flat = [_flat(np.ascontiguousarray(flip)) for flip in flips]
    among = torch.stack([_distances(flat[0], flip) for flip in flat]).amin(0)
    among.fill_diagonal_(torch.inf)
    usual = float(among.amin(1).median())
    # by blocks: a thousand pairs are 50 MB
    blocks = [_flat(drawn[n : n + _ROWS]) for n in range(0, len(drawn), _ROWS)]
    nearest = torch.cat(
        [torch.stack([_distances(b, flip).amin(1) for flip in flat]).amin(0) for b in blocks]
    )
    limit = COPY_RATIO * usual
    return {
        "nearest": float(nearest.median()),
        "nearest_train": usual,
        "ratio": float(nearest.median()) / usual if usual else None,
        "copies": [name for name, far in zip(names, nearest, strict=True) if far < limit],
    }


def _pairwise(pictures: Bytes) -> float | None:
    """Mean distance of all pairs of different pictures."""
    count = len(pictures)
    if count < 2:
        return None
    rows = [_flat(pictures[n : n + _ROWS]) for n in range(0, count, _ROWS)]
    total = 0.0
    for n, some in enumerate(rows):
        # the distance to itself is zero but for rounding, which counts as zero
        total += float(_distances(some, some).fill_diagonal_(0).sum())
        total += sum(2 * float(_distances(some, others).sum()) for others in rows[n + 1 :])
    return total / (count * (count - 1))


def _flat(pictures: Bytes) -> Tensor:
    """uint8 [N, S, S, 3] -> float32 [N, S·S·3] whose distances are root mean squares."""
    flat = torch.from_numpy(pictures).flatten(1).float() / 255
    return flat / flat.shape[1] ** 0.5


def _distances(some: Tensor, others: Tensor) -> Tensor:
    # the fast way by products loses small distances, which are those of copies
    return torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")


def _difference(image: Bytes, anomaly: Bytes, mask: Flags) -> float:
    return float(np.abs(image[mask].astype(np.int16) - anomaly[mask]).mean()) / 255


def _grown(mask: Flags) -> NDArray[np.bool_]:
    margin = max(round(MARGIN * max(mask.shape)), 1)
    kernel = np.ones((2 * margin + 1, 2 * margin + 1), np.uint8)
    return np.asarray(cv2.dilate(mask.astype(np.uint8), kernel) > 0)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def by_defect(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    """Samples of each defect, in the order in which defects appear."""
    for defect in dict.fromkeys(sample.defect for sample in samples):
        yield defect, [sample for sample in samples if sample.defect == defect]
