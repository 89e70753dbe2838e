"""How a network's branches are coupled, block by block: data, which an adapter's file brings.

DualAnoDiff (arXiv 2408.13509) is one coupling, `Coupling.released`, and a file that names none has
it. Double Helix Diffusion (arXiv 2509.12787) is another, `Coupling.dh_diff`: its authors published
neither equations nor code nor weights, so its parts are our definition of the pattern they
describe: separation, connection, merging.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from dualdiff_engine.exchanges import INTERACTION, KINDS

VERSION = 1
SEPARATE, CONNECT = SELF = ("separate", "connect")
PLAIN, ALIGN = TEXT = ("plain", "align")
ANOMALY, MASK = ANNOTATIONS = ("anomaly", "mask")
PLACEHOLDER = "sks"
# SD-1.5 has 16
MOST_BLOCKS = 256
_MOST_WORD = 64
_STAGES = ("down_blocks", "mid_block", "up_blocks")


@dataclass(frozen=True)
class Block:
    """The coupling of a transformer block's two sites.

    attention: separate, each branch over its own tokens, or connect, over those of both. text:
    plain, or align: each branch's scores of the placeholder's tokens are moved to where the other
    branch looks for them. exchange, text_exchange: kinds of `exchanges.KINDS`, after either site.
    """

    attention: str = SEPARATE
    exchange: str = INTERACTION
    text: str = PLAIN
    text_exchange: str = INTERACTION

    def __post_init__(self) -> None:
        for name, value, known in (
            ("attention", self.attention, SELF),
            ("exchange", self.exchange, tuple(KINDS)),
            ("text", self.text, TEXT),
            ("text_exchange", self.text_exchange, tuple(KINDS)),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(known)}")


# of DualAnoDiff
RELEASED = (Block(),)
# of Double Helix Diffusion, block after block, and again
CYCLE = (
    Block(SEPARATE, "none", PLAIN, "none"),
    Block(CONNECT, "none", ALIGN, "none"),
    Block(SEPARATE, "merge", PLAIN, "merge"),
)


@dataclass(frozen=True)
class Coupling:
    """blocks: in order of execution. annotation: what the second branch draws, the anomaly on
    black, or its mask, white on black. placeholder: the word of the prompts that stands for the
    anomaly, whose tokens align moves. Raises ValueError for what is none of these.
    """

    blocks: tuple[Block, ...]
    annotation: str = ANOMALY
    placeholder: str = PLACEHOLDER

    def __post_init__(self) -> None:
        if not 1 <= len(self.blocks) <= MOST_BLOCKS:
            raise ValueError(f"a coupling has 1 to {MOST_BLOCKS} blocks, not {len(self.blocks)}")
        if self.annotation not in ANNOTATIONS:
            raise ValueError(
                f"annotation {self.annotation!r} is not one of {', '.join(ANNOTATIONS)}"
            )
        word = self.placeholder
        if not isinstance(word, str) or not word.strip() or len(word) > _MOST_WORD:
            raise ValueError(f"placeholder {str(word)[:80]!r} is not a word of the prompts")

    @classmethod
    def released(cls, blocks: int) -> Coupling:
        """DualAnoDiff's."""
        return cls(RELEASED * blocks)

    @classmethod
    def cycled(cls, cycle: Sequence[Block], blocks: int, annotation: str = ANOMALY) -> Coupling:
        """A few blocks' coupling, again and again."""
        return cls(tuple(cycle[n % len(cycle)] for n in range(blocks)), annotation)

    @classmethod
    def dh_diff(cls, blocks: int, annotation: str = MASK) -> Coupling:
        """The default cycle of our pattern of Double Helix Diffusion."""
        return cls.cycled(CYCLE, blocks, annotation)

    @classmethod
    def of(cls, value: object) -> Coupling:
        """From parsed JSON, which may come from others. Raises ValueError for anything else."""
        if not isinstance(value, Mapping):
            raise ValueError("not an object")
        if value.get("version") != VERSION:
            raise ValueError(
                f"version {str(value.get('version'))[:40]!r} is not {VERSION}: use a newer release"
            )
        rows: Any = value.get("blocks")
        if not isinstance(rows, list) or len(rows) > MOST_BLOCKS:
            raise ValueError(f"blocks are not a list of at most {MOST_BLOCKS}")
        for row in rows:
            if not isinstance(row, list) or [type(x) for x in row] != [str] * 4:
                raise ValueError(f"block {str(row)[:80]} is not four words")
        blocks = tuple(Block(*row) for row in rows)
        given = {name: value[name] for name in ("annotation", "placeholder") if name in value}
        return cls(blocks, **given)

    def record(self) -> dict[str, Any]:
        """JSON-ready; `of` is the inverse."""
        blocks = [list(astuple(block)) for block in self.blocks]
        return {"version": VERSION, **asdict(self), "blocks": blocks}

    @property
    def aligns(self) -> bool:
        return any(block.text == ALIGN for block in self.blocks)

    def __str__(self) -> str:
        kinds = dict.fromkeys("/".join(astuple(block)) for block in self.blocks)
        return f"{', '.join(kinds)} in {len(self.blocks)} blocks, draws the {self.annotation}"


def cycle_of(text: str) -> tuple[Block, ...]:
    """Blocks of "separate/none/plain/none,connect/none/align/none". Raises ValueError."""
    rows = [part.strip().split("/") for part in text.split(",")]
    for row in rows:
        if len(row) != 4:
            raise ValueError(
                f"block {'/'.join(row)[:80]!r} is not attention/exchange/text/exchange, such as "
                "separate/merge/plain/merge"
            )
    return tuple(Block(*row) for row in rows)


def blocks_of(sites: Iterable[str]) -> list[str]:
    """Transformer blocks of attention sites by diffusers' names, in order of execution."""
    names = {site.removesuffix(".attn1").removesuffix(".attn2") for site in sites}

    def order(name: str) -> tuple[int, list[int]]:
        stage = name.partition(".")[0]
        known = _STAGES.index(stage) if stage in _STAGES else len(_STAGES)
        return known, [int(n) for n in re.findall(r"\d+", name)]

    return sorted(names, key=order)
