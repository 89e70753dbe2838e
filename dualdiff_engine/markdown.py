"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """rows[0]: headings, of which all but the first `texts` are of numbers."""
    lines = [rows[0], ["---"] * texts + ["---:"] * (len(rows[0]) - texts), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
