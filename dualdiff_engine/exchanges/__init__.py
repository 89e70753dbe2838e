"""The kinds of exchange between the branches of a site, by name.

A kind is one file: its tensors in an adapter's file, how they are folded, what the folded ones
compute, and its unfolded form, which is trained and is the oracle. `KINDS` is its registration.
Loading this package does not load PyTorch: options name kinds too.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualdiff_engine.exchanges.kind import Kind

NONE, INTERACTION = "none", "interaction"
# name -> (module, class)
KINDS: Mapping[str, tuple[str, str]] = {
    NONE: ("nothing", "Nothing"),
    INTERACTION: ("interaction", "Interaction"),
    "merge": ("merge", "Merge"),
}


@functools.cache
def of_kind(name: str) -> Kind:
    """A kind of `KINDS`."""
    module, cls = KINDS[name]
    made: Kind = getattr(importlib.import_module(f"{__name__}.{module}"), cls)()
    return made
