"""One exception family. Every message names the thing that is wrong and what to do about it."""

from __future__ import annotations


class DualDiffError(Exception):
    """Base of every error this package raises on purpose."""


class SettingsError(DualDiffError, ValueError):
    """An argument of a call or of the command line is not usable."""


class AdapterError(DualDiffError, ValueError):
    """An adapter file is missing, damaged, hostile, or does not fit the base model."""


class BaseModelError(DualDiffError, ValueError):
    """The base model folder is missing, incomplete, or of a kind the engine does not run."""


class DataError(DualDiffError, ValueError):
    """Training data cannot be used; every fault on a line of its own, with its file."""


class BackendError(DualDiffError, RuntimeError):
    """An explicitly requested backend cannot be used here; the message holds the reason."""


class SegmenterError(DualDiffError, ValueError):
    """A mask segmenter file cannot be used."""


class OutputError(DualDiffError, OSError):
    """The output folder cannot be written, or already holds another run."""


class TrainingError(DualDiffError, RuntimeError):
    """A training run cannot go on; the message holds the reason and the state that is left."""


class PairError(DualDiffError, ArithmeticError):
    """A pair came out unusable: not finite, or of one colour.

    Attributes:
        seed: of the pair.
        reason: what is wrong with it and what to try.
    """

    def __init__(self, seed: int, reason: str) -> None:
        self.seed = seed
        self.reason = reason
        super().__init__(f"the pair of seed {seed} cannot be used: {reason}")


class OutOfMemoryError(DualDiffError, MemoryError):
    """A batch did not fit.

    Attributes:
        batch: the batch (in pairs) that was tried.
        fits: the largest smaller batch whose denoiser call was tried and fitted, 0 if none did.
    """

    def __init__(self, batch: int, fits: int) -> None:
        self.batch = batch
        self.fits = fits
        remedy = (
            f"a batch of {fits} fits: pass batch={fits}"
            if fits
            else "not even one pair fits: use a smaller size or dtype bfloat16"
        )
        super().__init__(f"out of memory at a batch of {batch} pairs; {remedy}")
