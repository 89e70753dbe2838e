"""Datasets that are killed: `python -m dualdiff_engine.bench.dataset_kills`.

A run is killed at random moments, again and again, until its dataset is whole; then it is compared
with one that nothing disturbed. `group`: the run and its workers are killed at once, as by a
machine that goes down. `driver`: only the run is, its workers live on as orphans, and it is started
again at once. The stub engine draws noise; `--engine` draws with the demo's model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from dualdiff_engine.bench import machine
from dualdiff_engine.bench.dataset_stub import NAME, VARIABLE
from dualdiff_engine.dataset import job_file, layout
from dualdiff_engine.dataset.make import Maker
from dualdiff_engine.dataset.rows import ACCEPTED, parts_of, rows_of
from dualdiff_engine.dataset.worker import PAINTER

RECORD = Path("bench/results/dataset_kills.json")
# seconds after which a run that was not killed has hung
PATIENCE = 600.0
BATCH = 4


def job_of(out: Path, pairs: int) -> Any:
    """One defect of the demo."""
    chip = {"product": "washer", "defect": "chip", "adapter": "demo:washer/chip", "pairs": pairs}
    return job_file.parse(
        {
            "base": "demo", "out": str(out), "defects": [chip], "sampling": {"steps": 3},
            "limits": {"batch": BATCH, "attempts": 1}, "engine": {"device": "cpu"},
            "gates": {"empty": "record", "full": "record"},
        }
    )  # fmt: skip


def run(out: Path, pairs: int, painter: str) -> None:
    """A whole run in this process."""
    made = Maker(job_of(out, pairs)).run(painter=painter)
    assert not made.missing, made


def start(out: Path, pairs: int, painter: str) -> int:
    """A run in a forked process, the leader of a group; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        run(out, pairs, painter)
        code = 0
    finally:
        os._exit(code)


def workers_of(driver: int) -> list[int]:
    """Processes that a run has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(driver)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


def kill_once(
    out: Path, pairs: int, painter: str, chance: random.Random, span: float, kind: str
) -> tuple[bool, int]:
    """Start a run and kill it; whether that came before its end, and how many pairs were lost."""
    driver = start(out, pairs, painter)
    known = set((out / layout.STARTED).glob("*.jsonl")) if out.exists() else set()
    deadline = time.monotonic() + PATIENCE
    # most moments are while pairs are drawn, one in ten while it starts
    early = chance.random() < 0.1
    while not early and time.monotonic() < deadline:
        begun = set((out / layout.STARTED).glob("*-[0-9]*.jsonl")) - known
        if any(path.stat().st_size for path in begun):
            break
        if os.waitpid(driver, os.WNOHANG)[0]:
            return False, 0
        time.sleep(0.005)
    time.sleep(chance.uniform(0, span))
    victims = workers_of(driver) if kind == "group" else []
    try:
        os.kill(driver, signal.SIGKILL)
        code = os.waitpid(driver, 0)[1]
    except (ProcessLookupError, ChildProcessError):
        return False, 0
    for victim in victims:
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:
            continue
    lost = lost_pairs(out) if kind == "group" else 0
    return os.WIFSIGNALED(code), lost


def lost_pairs(out: Path) -> int:
    """Pairs that the last workers had begun and not written."""
    time.sleep(0.05)
    begun: set[str] = set()
    for path in (out / layout.STARTED).glob("*.jsonl") if out.exists() else ():
        for line in path.read_bytes().split(b"\n")[:-1]:
            begun |= set(json.loads(line)["keys"])
    written = {row["key"] for part in parts_of(out) for row in rows_of(part)}
    return len(begun - written)


def state_of(out: Path) -> dict[str, Any]:
    """What a finished dataset holds."""
    store = out / layout.STORE
    files = [path for path in store.rglob("*") if path.is_file()]
    rows = [row for part in parts_of(out) for row in rows_of(part)]
    keys = Counter(row["key"] for row in rows if row["verdict"] == ACCEPTED)
    return {
        "files": {
            str(p.relative_to(store)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        },
        "twice": sum(count > 1 for count in keys.values()),
        "numbers_twice": len(keys) - len({key.rpartition(".")[0] for key in keys}),
        "partials": sum(path.is_file() for path in (out / layout.PARTIAL).rglob("*")),
    }


def series(kind: str, kills: int, seed: int, painter: str, root: Path) -> dict[str, Any]:
    """Kills of one kind; returns what was found."""
    span, pairs = (1.0, 400) if painter == NAME else (6.0, 24)
    chance, done, lost, datasets = random.Random(seed), 0, [], 0
    found = Counter[str]()
    reference = root / f"{kind}-undisturbed"
    run(reference, pairs, painter)
    wanted = state_of(reference)["files"]
    while done < kills:
        out, datasets = root / f"{kind}-{datasets}", datasets + 1
        while done < kills:
            hit, gone = kill_once(out, pairs, painter, chance, span, kind)
            if not hit:
                break
            done += 1
            lost.append(gone)
        run(out, pairs, painter)
        state = state_of(out)
        files = state["files"]
        found["files that differ"] += sum(files.get(n) != own for n, own in wanted.items())
        found["files too many"] += len(files.keys() - wanted.keys())
        for name in ("twice", "numbers_twice", "partials"):
            found[name] += state[name]
    return {
        "kind": kind, "kills": done, "seed": seed, "datasets": datasets, "pairs": pairs,
        "files compared": len(wanted) * datasets, **found,
        "most pairs lost by a kill": max(lost) if kind == "group" else None,
        "mean pairs lost by a kill": round(sum(lost) / len(lost), 2) if kind == "group" else None,
        "batch": BATCH,
    }  # fmt: skip


def main() -> int:
    """Returns 1 if anything differs from what was undisturbed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", action="store_true", help="draw with the demo's model")
    parser.add_argument("--record", type=Path, default=None, help="JSON file to add the result to")
    chosen = parser.parse_args()
    painter = PAINTER if chosen.engine else NAME
    os.environ[VARIABLE] = json.dumps({"batch": BATCH, "delay": 0.02})
    results = []
    with tempfile.TemporaryDirectory() as root:
        for kind in ("group", "driver"):
            result = series(kind, chosen.kills, chosen.seed, painter, Path(root))
            result["painter"] = painter.rpartition(":")[2]
            print(json.dumps(result), flush=True)
            results.append(result)
    if chosen.record:
        known = json.loads(chosen.record.read_text()) if chosen.record.exists() else {}
        known[results[0]["painter"]] = {"machine": machine.facts("cpu"), "series": results}
        chosen.record.write_text(json.dumps(known, indent=1) + "\n")
    wrong = ("files that differ", "files too many", "numbers_twice", "partials")
    return int(any(result[name] for result in results for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
