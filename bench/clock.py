"""Time short device work: variants in turn, caches cold, and the ceilings to hold it against."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

Work = Callable[[], object]

WARM_UP = 3
# round robin goes on until either is reached, but at least for FEWEST rounds
ROUNDS, FEWEST, PATIENCE_S = 21, 3, 4.0
# of the caches' size: the previous variant's data is gone, and the flush takes longer than a launch
FLUSH = 8
COPY_BYTES = {"cuda": 1 << 32, "cpu": 1 << 28}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def exact_convolutions() -> Iterator[None]:
    """float32 ones without TF32, which PyTorch lets cuDNN use: what others are compared with."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


class Clock:
    """Seconds of one call on a device, by its own events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(FLUSH * cache, dtype=torch.int8, device=device)

    def seconds(self, work: Work) -> float:
        if self._flush is None:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # while the cache is flushed, the host launches what is timed: gaps do not count
        self._flush.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def interleaved(
    variants: Mapping[str, Work],
    device: torch.device,
    rounds: int = ROUNDS,
    patience_s: float = PATIENCE_S,
    warm_up: int = WARM_UP,
) -> dict[str, list[float]]:
    """Seconds per variant and round, A B A B after a warm-up; as many rounds for each."""
    clock = Clock(device)
    for _ in range(warm_up):
        for work in variants.values():
            work()
    synchronize(device)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for number in range(rounds):
        if number >= FEWEST and time.perf_counter() - start > patience_s:
            break
        for name, work in variants.items():
            seconds[name].append(clock.seconds(work))
    return seconds


@dataclass(frozen=True)
class Ceilings:
    """Best rates of this device in this run: bytes read and written, and products, per second."""

    bytes_per_s: float
    flops_per_s: float

    def floor_s(self, flops: int, moved: int) -> tuple[float, str]:
        """The least time for that work, and what it is bound by."""
        by_bytes, by_products = moved / self.bytes_per_s, flops / self.flops_per_s
        return max((by_bytes, "bytes"), (by_products, "products"))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large copy and a large product on random data."""
    size = PRODUCT_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    # zeros move and multiply faster than data does
    source = torch.randn(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = interleaved(
        {"copy": lambda: target.copy_(source), "product": lambda: left @ right}, device
    )
    return Ceilings(2 * source.nbytes / min(seconds["copy"]), 2 * size**3 / min(seconds["product"]))
