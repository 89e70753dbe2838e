"""What `dualdiff eval preset` found about an adapter: verdicts in a file beside it.

The file, `presets.json` in the adapter's folder, maps the adapter's sha256 to presets, and those to
verdicts: `gate` (passed or failed), `gates`, `pairs`, `base` (sha256), `sampling`, `versions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dualdiff_engine.files import write_whole
from dualdiff_engine.settings import RELEASED, ChosenSampling

FILE = "presets.json"
PASSED, FAILED, NOT_MEASURED = "passed", "failed", "not measured"
_WORDS = {True: PASSED, False: FAILED, None: NOT_MEASURED}
# it comes with adapters from others
_MOST_BYTES = 1 << 20


def read(adapter: str | Path, sha256: str) -> dict[str, dict[str, Any]]:
    """Verdicts by preset; those that are damaged or of other adapters are left out."""
    found = _content(Path(adapter)).get(sha256)
    if not isinstance(found, dict):
        return {}
    return {str(name): row for name, row in found.items() if _is_verdict(row)}


def keep(adapter: str | Path, sha256: str, found: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write verdicts by preset beside an adapter, in place of earlier ones. Raises OutputError.

    Returns the file.
    """
    content = _content(Path(adapter))
    content[sha256] = {**read(adapter, sha256), **found}
    path = _beside(Path(adapter))
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return path


def of_run(
    base: Mapping[str, str],
    adapter: Mapping[str, Any],
    sampling: ChosenSampling,
    *,
    placed: bool = False,
) -> dict[str, str] | None:
    """A preset as a recipe holds it: its name and its gate; None without a preset.

    base, adapter: source and sha256 of each. A verdict counts for the base and the values that it
    was found with, and not for placed pairs, which are drawn another way.
    """
    if sampling.preset is None:
        return None
    if sampling.preset == RELEASED:
        return {"name": RELEASED}
    row = read(adapter["source"], adapter["sha256"]).get(sampling.preset, {})
    same = row.get("base") == base["sha256"] and row.get("sampling") == sampling.recorded()
    same = same and not placed
    return {"name": sampling.preset, "gate": row["gate"] if same else NOT_MEASURED}


def line(verdict: Mapping[str, Any] | None) -> str:
    """A verdict in a few words."""
    if verdict is None:
        return NOT_MEASURED
    gates = ", ".join(f"{name} {_WORDS.get(ok)}" for name, ok in verdict["gates"].items())
    return f"{verdict['gate']} on {verdict['pairs']} pairs ({gates})"


def _beside(adapter: Path) -> Path:
    return (adapter if adapter.is_dir() else adapter.parent) / FILE


def _content(adapter: Path) -> dict[str, Any]:
    try:
        path = _beside(adapter)
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return {}
        content = json.loads(path.read_bytes())
    # hundreds of brackets end in a RecursionError
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_verdict(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.get("gate") in (PASSED, FAILED)
        and isinstance(row.get("gates"), dict)
        and all(ok in (True, False, None) for ok in row["gates"].values())
        and isinstance(row.get("pairs"), int)
    )
