"""Tables of the READMEs, generated from the records in bench/results/.

`python -m dualdiff_engine.bench.readme` writes them; a test compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dualdiff_engine.bench import demo_stages, end_to_end
from dualdiff_engine.bench.step import report
from dualdiff_engine.evaluation import report as evaluation
from dualdiff_engine.evaluation.report import markdown_table
from dualdiff_engine.ops import BACKENDS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    *("README.md", "docs/faults.md", "docs/masks.md", "docs/performance.md"),
    *("export/README.md", "dualdiff_engine/demo/README.md"),
)
_SLOT = re.compile(r"(<!-- record (?P<file>[\w.-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _masks(rows: list[dict[str, Any]]) -> str:
    sizes = sorted({row["size"] for row in rows})
    head = ["defects", *(f"{size} px" for size in sizes)]
    lines = [head]
    for family in dict.fromkeys(row["family"] for row in rows):
        found = {row["size"]: row["mean_iou"] for row in rows if row["family"] == family}
        lines.append([family, *(f"{found[size]:.3f}" for size in sizes)])
    return markdown_table(lines)


def _faults(rows: list[dict[str, Any]]) -> str:
    head = ["fault", "tried", "refused in one line", "ended in a result", "longest, s", "most, MiB"]
    counts = ("tried", "refused", "result")
    lines = [
        [row["fault"], *(str(row[n]) for n in counts), f"{row['seconds']:.1f}", str(row["mib"])]
        for row in rows
    ]
    total = [str(sum(row[name] for row in rows)) for name in counts]
    return markdown_table([head, *lines, ["**all**", *total, "", ""]])


def _coupled_ops(record: dict[str, Any]) -> str:
    """Every backend's time beside the plain formula's, and of connect beside as many own keys."""
    head = ["op", "shapes", "by", "ms p50", "to plain formula", "to attention of own keys"]
    lines = [
        [
            *(str(row[name]) for name in ("op", "shapes", "by")),
            f"{row['ms']['p50']:.2f}",
            f"{row['speedup_over_eager']:.2f}x",
            f"{row['rate_to_own_keys']:.2f}" if "rate_to_own_keys" in row else "",
        ]
        for row in record["rows"]
        if row["by"] in BACKENDS and row["status"] == "ok"
    ]
    case, dtype = record["case"], record["rows"][0]["dtype"]
    facts = (
        f"{case['model']}, {case['batch']} pair(s), {case['size']} px, {dtype}; "
        f"{record['device_name']}, {record['threads']} thread(s), {record['instructions']}, "
        f"torch {record['versions']['torch']}, commit {record['commit']}."
    )
    return f"{markdown_table([head, *lines])}\n\n{facts}"


def section(path: Path) -> str:
    """What a record looks like in the README."""
    record = json.loads(path.read_text("utf-8"))
    if "faults" in record:
        return _faults(record["faults"])
    if record.get("case", {}).get("coupled"):
        return _coupled_ops(record)
    if "batches_of_a_run" in record:
        return f"{end_to_end.table(record)}\n\n{end_to_end.headline(record)}."
    if "rows" in record:
        return _masks(record["rows"])
    if "tasks" in record:
        tasks = record["tasks"]
        if demo_stages.UNTOUCHED in record["overall"]["arms"]:
            return evaluation.against_first(tasks)
        return f"{evaluation.downstream(tasks)}\n\n{evaluation.headline(tasks)}"
    if "defects" in record:
        return evaluation.quality(record)
    if "graphs" in record:
        return f"{report.export_table(record)}\n\n{report.export_headline(record)}"
    return f"{report.step_table(record)}\n\n{report.headline(record)}."


def generate(document: str, root: Path = ROOT) -> str:
    """A README with every slot filled from its record."""

    def fill(match: re.Match[str]) -> str:
        text = section(root / "bench" / "results" / match["file"])
        return f"{match[1]}{text}\n{match[3]}"

    return _SLOT.sub(fill, (root / document).read_text("utf-8"))


if __name__ == "__main__":
    for name in DOCUMENTS:
        (ROOT / name).write_text(generate(name), "utf-8")
