"""Downstream tasks: from a user's real pictures, or from the factory of the demo."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dualdiff_engine.errors import DataError
from dualdiff_engine.evaluation.data import (
    Bytes,
    Sample,
    find_good,
    find_real,
    load_pictures,
    load_reduced,
)
from dualdiff_engine.evaluation.downstream import Material, Task

FEW = 8
# of the factory, apart from each other, from training (one million) and the base (ten million on)
CEILING_SEED, TEST_SEED, GOOD_SEED, TEST_GOOD_SEED = 2_000_000, 3_000_000, 4_000_000, 5_000_000
GOOD = 100
TEST = 100


def user_task(
    pairs: Sequence[Sample], real: Path, defect: str, size: int, few: int = FEW, more: int = 0
) -> Task:
    """The downstream task on a user's pictures: arms `real`, `generated`, `both`.

    Args:
        pairs: generated pairs.
        real: folder in MVTec layout, with `train/good` and `test/good`.
        defect: a folder in `test/`.
        size: side of the square pictures in pixels.
        few: real pictures to train on, the first by name.
        more: if not 0, a fourth arm `ceiling` trains on this many real pictures in addition.

    Returns:
        The task. All arms are tested on the real pictures after those.

    Raises:
        DataError: pictures are missing or unusable, or fewer than 2 are left for testing.
    """
    samples = find_real(real, defect)
    good, test_good = find_good(real, "train"), find_good(real, "test")
    if len(samples) < few + more + 2:
        raise DataError(
            f"{real}/test/{defect}: {len(samples)} pictures found. {few + more} of them for "
            f"training leave {max(len(samples) - few - more, 0)} for testing, at least 2 are "
            "needed: train on fewer"
        )
    arms = _arms(_loaded(samples[:few], size), _loaded(pairs, size))
    if more:
        arms["ceiling"] = _loaded(samples[: few + more], size)
    test = _loaded(samples[few + more :], size)
    return Task(arms, load_pictures(good, size), test, load_pictures(test_good, size))


def factory_task(pairs: Sequence[Sample], part: str, defect: str, size: int) -> Task:
    """Arms on `generated` pairs, on the `real` pictures that the demo adapter was trained on, on
    `both`, and a `ceiling` of as many new ones as there are pairs with a mask.

    They train with `GOOD` good pictures, and are tested on `TEST` defective ones, as many good.
    """
    generated = _loaded(pairs, size).marked()
    ceiling = _made(part, defect, CEILING_SEED, len(generated), size)
    arms = {**_arms(_trained_on(part, defect, size), generated), "ceiling": ceiling}
    return material_task(arms, part, defect, size)


def arms_task(arms: Mapping[str, Sequence[Sample]], part: str, defect: str, size: int) -> Task:
    """As `factory_task`, with an arm for each set of pairs, alone and with the `real` pictures."""
    real = _trained_on(part, defect, size)
    given = {name: _loaded(samples, size).marked() for name, samples in arms.items()}
    joined = {f"real + {name}": real.joined(material) for name, material in given.items()}
    return material_task({"real": real, **given, **joined}, part, defect, size)


def material_task(arms: Mapping[str, Material], part: str, defect: str, size: int) -> Task:
    """The arms of a factory defect, with the good and unseen pictures that all such tasks share."""
    return Task(
        arms,
        _made(part, None, GOOD_SEED, GOOD, size).images,
        _made(part, defect, TEST_SEED, TEST, size),
        _made(part, None, TEST_GOOD_SEED, TEST, size).images,
    )


def _trained_on(part: str, defect: str, size: int) -> Material:
    with tempfile.TemporaryDirectory() as folder:
        return _loaded(training_samples(Path(folder), part, defect), size)


def training_samples(folder: Path, part: str, defect: str) -> list[Sample]:
    """The pictures that the demo's adapter of this defect was trained on, written to a folder."""
    from dualdiff_engine.demo.factory.samples import write_dataset
    from dualdiff_engine.demo.train.adapters import DATA_SEED, PICTURES

    write_dataset(folder, part, [defect], good=0, defective=PICTURES, seed=DATA_SEED)
    return find_real(folder, defect)


def _arms(real: Material, generated: Material) -> dict[str, Material]:
    return {"real": real, "generated": generated, "both": real.joined(generated)}


def _loaded(samples: Sequence[Sample], size: int) -> Material:
    return Material(*load_reduced(samples, size))


def _made(part: str, defect: str | None, seed: int, count: int, size: int) -> Material:
    from dualdiff_engine.demo.factory.samples import make
    from dualdiff_engine.evaluation.data import reduced, reduced_mask

    products = [make(part, defect, seed=seed + n) for n in range(count)]
    images: Bytes = np.stack([reduced(product.image, size) for product in products])
    return Material(images, np.stack([reduced_mask(p.mask > 0, size) for p in products]))
