"""The downstream test: a segmentation network trained on some defects, tested on unseen ones.

The experiment of DualAnoDiff (https://arxiv.org/abs/2408.13509, section 4.3) at a small scale: the
same U-Net, steps, good pictures and augmentation, and only the defective pictures differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.evaluation import metrics
from dualdiff_engine.evaluation.data import Bytes, Flags
from dualdiff_engine.evaluation.segmentation_unet import WIDTHS, UNet
from dualdiff_engine.settings import require_seed

METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1_max", "image_auroc")
# pixels of a side: the score of a picture is its most suspicious window, not one noisy pixel
WINDOW = 5
FEWEST = 2


@dataclass(frozen=True)
class DownstreamOptions:
    """How every network is trained.

    Args:
        steps: optimizer steps.
        batch: pictures per step, an even number; half of them are good, if there are good ones.
        learning_rate: of AdamW: rises over the first tenth to this value, then a cosine to zero.
        seeds: one training run per seed, for initial weights, order and augmentation.
        size: side of the square pictures in pixels.
        widths: channels of the U-Net per level.

    Raises:
        SettingsError: a value is out of its range.
    """

    steps: int = 300
    batch: int = 8
    learning_rate: float = 4e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    size: int = 128
    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        multiple = 2 ** (len(self.widths) - 1)
        checks = (
            (1 <= self.steps <= 1_000_000, "steps must be from 1 to 1,000,000", self.steps),
            (self.batch >= 2 and self.batch % 2 == 0, "batch must be even", self.batch),
            (0 < self.learning_rate <= 1, "learning_rate must be in (0, 1]", self.learning_rate),
            (len(set(self.seeds)) == len(self.seeds) > 0, "seeds must differ", self.seeds),
            (
                16 <= self.size <= 1024 and self.size % multiple == 0,
                f"size must be a multiple of {multiple} from 16 to 1024",
                self.size,
            ),
        )
        for fits, message, value in checks:
            if not fits:
                raise SettingsError(f"{message}, got {value}")
        for seed in self.seeds:
            require_seed(seed)

    def listed(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True)
class Material:
    """Pictures uint8 [N, S, S, 3] and their masks bool [N, S, S]."""

    images: Bytes
    masks: Flags

    def __len__(self) -> int:
        return len(self.images)

    def marked(self) -> Material:
        """Without the pictures whose masks are empty."""
        kept = self.masks.any(axis=(1, 2))
        return Material(self.images[kept], self.masks[kept])

    def joined(self, other: Material) -> Material:
        images = np.concatenate([self.images, other.images])
        return Material(images, np.concatenate([self.masks, other.masks]))


@dataclass(frozen=True)
class Task:
    """arms: what networks are trained on, by name. good: trained on by all of them, may be none.

    test: unseen defective pictures; test_good: unseen good ones, uint8 [N, S, S, 3] as `good`.
    """

    arms: Mapping[str, Material]
    good: Bytes
    test: Material
    test_good: Bytes


def run(
    task: Task, options: DownstreamOptions, report: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Train a network per arm and seed, and test each.

    Pixel metrics are over all pixels of all test pictures, good ones included. The score of a
    picture is the largest mean logit over a window of 5 x 5.

    Args:
        task: pictures to train and to test on.
        options: see `Options`.
        report: called with one line of progress per network.

    Returns:
        `options`, numbers of pictures, and per arm its `runs` (a row per seed: `seed`, the metrics
        in [0, 1], `seconds` of training), their `mean` and `spread` (sample standard deviation,
        None for one seed); JSON-ready.

    Raises:
        SettingsError: fewer than two pictures of a kind, or an arm without a marked picture.
    """
    arms = {name: material.marked() for name, material in task.arms.items()}
    sizes = {f"arm {name!r}": len(m) for name, m in arms.items()}
    sizes |= {"test": len(task.test), "good test": len(task.test_good)}
    for name, count in sizes.items():
        if count < FEWEST:
            raise SettingsError(
                f"{name}: {count} usable pictures found, at least {FEWEST} are needed: add more"
            )
    record: dict[str, Any] = {
        "options": options.listed(),
        "threads": torch.get_num_threads(),
        "pictures": {
            "good": len(task.good),
            "test": len(task.test),
            "good test": len(task.test_good),
        },
        "arms": {},
    }
    for name, material in arms.items():
        rows = []
        for seed in options.seeds:
            start = time.perf_counter()
            network = train(material, task.good, options, seed)
            seconds = time.perf_counter() - start
            scores = test(network, task.test, task.test_good)
            rows.append({"seed": seed, **scores, "seconds": round(seconds, 1)})
            report(f"{name}, seed {seed}: AP {scores['pixel_ap']:.3f}, {seconds:.0f} s")
        record["arms"][name] = {"pictures": len(material), "runs": rows, **summary(rows)}
    return record


def summary(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every metric over rows."""
    values = {name: np.array([row[name] for row in rows], np.float64) for name in METRICS}
    several = len(rows) > 1
    return {
        "mean": {name: float(found.mean()) for name, found in values.items()},
        "spread": {n: float(v.std(ddof=1)) if several else None for n, v in values.items()},
    }


@torch.inference_mode(mode=False)
@torch.enable_grad()
def train(defective: Material, good: Bytes, options: DownstreamOptions, seed: int) -> UNet:
    """A U-Net in eval mode, the same on every run with as many threads.

    Loss: binary cross entropy and soft Dice (Milletari et al. 2016) over the batch.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = UNet(options.widths)
    batches = _batches(defective, good, options.batch, seed)
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, total_steps=options.steps + 1, pct_start=0.1
    )
    for _ in range(options.steps):
        pictures, masks = next(batches)
        logits = network(pictures)
        loss = F.binary_cross_entropy_with_logits(logits, masks) + _dice(logits.sigmoid(), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.inference_mode()
def test(network: UNet, defective: Material, good: Bytes) -> dict[str, float]:
    """The metrics on unseen pictures, each in [0, 1]."""
    logits = torch.cat([_logits(network, images) for images in (defective.images, good)])
    masks = torch.zeros(logits.shape, dtype=torch.bool)
    masks[: len(defective)] = torch.from_numpy(defective.masks)
    windows = F.avg_pool2d(logits[:, None], WINDOW, stride=1).amax(dim=(1, 2, 3))
    return {
        "pixel_auroc": metrics.auroc(logits, masks),
        "pixel_ap": metrics.average_precision(logits, masks),
        "pixel_f1_max": metrics.f1_max(logits, masks),
        "image_auroc": metrics.auroc(windows, torch.arange(len(windows)) < len(defective)),
    }


def _dice(probability: Tensor, masks: Tensor) -> Tensor:
    # one pixel more on both sides: no division by zero where nothing is marked
    overlap = (probability * masks).sum()
    return 1 - (2 * overlap + 1) / (probability.sum() + masks.sum() + 1)


def _logits(network: UNet, images: Bytes) -> Tensor:
    parts = [_floats(torch.from_numpy(images[n : n + 16])) for n in range(0, len(images), 16)]
    return torch.cat([network(part) for part in parts])


def _floats(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in [0, 1], channels last."""
    return images.permute(0, 3, 1, 2).float() / 255


def _batches(
    defective: Material, good: Bytes, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pictures [B, 3, S, S] and masks [B, S, S], float32; endless, half defective, half good."""
    # by purpose: arms see the same good pictures in the same order and under the same light
    order, good_order, light = (torch.Generator().manual_seed(seed + n) for n in range(3))
    images, masks = torch.from_numpy(defective.images), torch.from_numpy(defective.masks)
    plain = torch.from_numpy(good)
    chosen, chosen_good = _shuffled(len(images), order), _shuffled(len(plain), good_order)
    half = batch // 2 if len(plain) else 0
    empty = torch.zeros(half, *masks.shape[1:])
    while True:
        some = [next(chosen) for _ in range(batch - half)]
        others = [next(chosen_good) for _ in range(half)]
        pictures = _floats(torch.cat([images[some], plain[others]]))
        marks = torch.cat([masks[some].float(), empty])
        yield _augmented(pictures, marks, light)


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """Endless: every index once, in a new order each round."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _augmented(
    pictures: Tensor, masks: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One of the square's eight symmetries, which move no pixel off the grid, and other light."""
    rotated, marks = [], []
    for picture, mask in zip(pictures, masks, strict=True):
        turns, flip = torch.randint(4, (2,), generator=generator).tolist()
        picture, mask = picture.rot90(turns, (1, 2)), mask.rot90(turns, (0, 1))
        rotated.append(picture.flip(2) if flip % 2 else picture)
        marks.append(mask.flip(1) if flip % 2 else mask)
    count = len(rotated)
    contrast = 1 + 0.2 * _signed(generator, count, 1, 1, 1)
    brightness = 0.1 * _signed(generator, count, 1, 1, 1)
    gain = 1 + 0.1 * _signed(generator, count, 3, 1, 1)
    lit = (torch.stack(rotated) - 0.5) * contrast + 0.5 + brightness
    lit = (lit * gain).clamp(0, 1)
    return lit.contiguous(memory_format=torch.channels_last), torch.stack(marks)


def _signed(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [-1, 1)."""
    return torch.rand(*shape, generator=generator) * 2 - 1
