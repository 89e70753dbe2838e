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
    """Memory ran out, and a smaller batch does not help.

    Attributes:
        doing: what was done when memory ran out: "at a batch of 1 pair", "while loading …".
        remedy: what needs less memory.
    """

    def __init__(self, doing: str, remedy: str) -> None:
        self.doing = doing
        self.remedy = remedy
        super().__init__(f"out of memory {doing}: {remedy}")
