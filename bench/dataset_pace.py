"""What the dataset factory itself costs: `python -m dualdiff_engine.bench.dataset_pace`.

A stub engine sleeps for each batch, as long as a device would be busy; the share of the time from
its first batch to its last in which it did not is idle. Two workers are compared with one. And
`dualdiff status` is timed, as a process of its own, on a dataset of so many rows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.dataset_kills import job_of
from dualdiff_engine.bench.dataset_stub import NAME, VARIABLE
from dualdiff_engine.dataset import layout, rows
from dualdiff_engine.dataset.make import Maker
from dualdiff_engine.dataset.store import Writer

BATCH = 8


def pace(root: Path, pairs: int, delay: float, side: int, workers: int) -> dict[str, Any]:
    """Draw with the stub; seconds are those between the first row and the last."""
    os.environ[VARIABLE] = json.dumps({"batch": BATCH, "delay": delay, "side": side})
    job = job_of(root, pairs).model_copy(update={"workers": workers})
    made = Maker(job).run(painter=NAME)
    assert not made.missing
    times: dict[str, list[float]] = {}
    for part in rows.parts_of(root):
        times[part.name] = [row["time"] for row in rows.rows_of(part)]
    seconds = max(max(own) for own in times.values()) - min(min(own) for own in times.values())
    signs = [layout.read_json(path) for path in (root / layout.WORKERS).iterdir()]
    # the first batch of each worker was over when its first row was written
    batches = sum(-(-len(own) // BATCH) - 1 for own in times.values())
    busy = batches * delay / workers
    return {
        "workers": workers, "pairs": pairs, "batch": BATCH, "seconds per batch": delay,
        "side": side, "seconds": round(seconds, 3), "busy": round(busy, 3),
        "idle share": round(1 - busy / seconds, 4),
        "waited for the disk": round(sum(said["waited"] for said in signs), 3),
    }  # fmt: skip


def status_seconds(root: Path, count: int) -> dict[str, Any]:
    """Time `status` on a dataset with so many rows of one part, which the last run has tallied."""
    maker = Maker(job_of(root, count))
    layout.make_folders(root)
    writer = Writer(root, "r", "r-d", "0-of-1")
    part = root / layout.PARTS / "r-0.jsonl"
    hashes = dict.fromkeys(layout.KINDS, "0" * 64)
    with part.open("w") as lines:
        for number in range(count):
            key = f"washer/chip/{number:06d}.0"
            scores = {"agreement": 0.9, "area": 0.01, "parts": 1.0}
            row = {"key": key, "verdict": "accepted", "seed": number, "scores": scores}
            lines.write(json.dumps({**row, "sha256": hashes, "time": 0.0}) + "\n")
    maker._write_plan(writer)
    started = time.monotonic()
    state = rows.union(root, files=False)
    read = time.monotonic() - started
    layout.put_json(root, writer.name, layout.TALLY, state.tally())
    writer.close()
    code = "import sys; from dualdiff_engine.cli.main import main; sys.exit(main())"
    taken = []
    for _ in range(5):
        started = time.monotonic()
        said = subprocess.run(
            [sys.executable, "-c", code, "status", str(root), "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        taken.append(time.monotonic() - started)
    assert json.loads(said.stdout)["defects"][0]["accepted"] == count
    return {
        "rows": count, "bytes": part.stat().st_size, "status seconds": round(min(taken), 3),
        "worst": round(max(taken), 3), "union of all rows at a start, seconds": round(read, 2),
    }  # fmt: skip


def main() -> int:
    """Print the figures, and add them to a record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--record", type=Path, default=None, help="JSON file to write")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        paces = [
            pace(root / f"{delay}-{side}-{workers}", 160 * workers, delay, side, workers)
            for delay, side in ((1.0, 512), (0.25, 64))
            for workers in (1, 2)
        ]
        for found in paces:
            print(json.dumps(found), flush=True)
        status = status_seconds(root / "status", chosen.rows)
        print(json.dumps(status))
    if chosen.record:
        content = {"machine": machine.facts("cpu"), "pace": paces, "status": status}
        chosen.record.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
