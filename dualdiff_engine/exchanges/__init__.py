"""The kinds of exchange between the branches of a site, by name.

A kind is one file: its tensors in an adapter's file, how they are folded, what the folded ones
compute, and its unfolded form, which is trained and is the oracle. `KINDS` is its registration.
"""

from __future__ import annotations

from collections.abc import Mapping

from dualdiff_engine.exchanges.interaction import Interaction
from dualdiff_engine.exchanges.kind import Affine as Affine
from dualdiff_engine.exchanges.kind import Kind as Kind
from dualdiff_engine.exchanges.kind import Reader as Reader
from dualdiff_engine.exchanges.kind import linear as linear
from dualdiff_engine.exchanges.merge import Merge
from dualdiff_engine.exchanges.nothing import Nothing

INTERACTION = "interaction"
KINDS: Mapping[str, Kind] = {"none": Nothing(), INTERACTION: Interaction(), "merge": Merge()}
