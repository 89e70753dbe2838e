"""What a kernel's inner loop can reach at best, read from its machine code: a prediction.

Every compilation of the budget in bf16 is disassembled for sm_90. Of the loop that does the work,
the instructions are counted, and with them the cycles that four parts of a multiprocessor need for
a tile. The longest of the four bounds the rate. `python -m dualdiff_engine.bench.static` prints the
table and fails on a change for the worse; `--update` writes `tests/ops/aot/static.json` anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dualdiff_engine.bench.gpu import aot
from dualdiff_engine.ops.triton import MODULES
from dualdiff_engine.ops.triton.attention import split
from dualdiff_engine.ops.triton.listing import Compilation

STATIC = aot.BUDGET.with_name("static.json")
ARCHITECTURE, KIND = 90, "bf16"
# of an H100 or H200 (SXM); four warps, one on each sub-partition, share a tensor-core instruction
MULTIPROCESSORS, CLOCK, WARPS = 132, 1.755e9, 4
TENSOR_FLOPS, SHARED_BYTES, MUFU_CYCLES = 4096, 128, 8
LANES, ITEM = 32, 2
LEGEND = f"""\
predicted from machine code for sm_90, nothing is measured. Cycles are a multiprocessor's for four
warps: {TENSOR_FLOPS} FLOP on tensor cores, {SHARED_BYTES} B of shared memory without conflicts,
{1 / MUFU_CYCLES} special functions (mufu) of each warp, one instruction of each warp;
{MULTIPROCESSORS} of them at {CLOCK / 1e9:g} GHz. At best: the four overlap and data is there.
TFLOP/s are useful ones, without padding of heads; TB/s, without products, are read and written.
Calibration: FlashAttention-3 takes its tensor and mufu cycles within 5 %, plain Triton 1.2 to 1.6
times them; uncertain by 20 %, the exchange by 35 %."""

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L\w+):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x(\d+)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_GLOBAL = ("LDG", "STG")


@dataclass(frozen=True)
class Instruction:
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def lane_bytes(self) -> int:
        """That a lane loads or stores."""
        if self.predicate == "!PT":
            return 0
        if self.name in ("LDSM", "STSM"):
            # 8 x 8 matrices of two bytes, over all lanes
            return 4 * int(self.opcode.rpartition(".")[2] if self.opcode[-1] in "24" else 1)
        return next((_WIDTHS[x] for x in self.opcode.split(".") if x in _WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """Instructions in order; loops: (first, last) of each, that of an endless branch left out."""

    instructions: Sequence[Instruction]
    loops: Sequence[tuple[int, int]]


def parse(listing: str) -> Code:
    """The output of `nvdisasm -c`."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    loops = []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.search(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
            target = _TARGET.search(found[3])
            if found[2].startswith("BRA") and target and target[1] in labels:
                first, last = labels[target[1]], len(instructions) - 1
                if first < last:
                    loops.append((first, last))
    return Code(instructions, loops)


def disassemble(cubin: bytes) -> Code:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        words = [str(aot.TOOLS / "nvdisasm"), "-c", "-ndf", str(path)]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
    return parse(run.stdout)


def working(code: Code, trips: int | None) -> list[tuple[float, Instruction]]:
    """(times, instruction) of an iteration of the innermost loops that do the work.

    Those are loops with products, else with accesses to memory. Around one that runs `trips` times,
    an instruction of the outer loop counts 1 / trips. Unrolled to the end there is no loop: then
    from the first access that feeds a product, or from the first load, to the last.
    """
    products = any(x.name == "HGMMA" for x in code.instructions)
    names = ("HGMMA",) if products else _GLOBAL

    def works(first: int, last: int) -> bool:
        return any(x.name in names for x in code.instructions[first : last + 1])

    loops = [loop for loop in code.loops if works(*loop)]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        fed = ("HGMMA", "LDGSTS", "UTMALDG") if products else names
        places = [i for i, x in enumerate(code.instructions) if x.name in fed]
        last = max((i for i in places if works(i, i)), default=-1)
        return [(1.0, x) for x in code.instructions[min(places, default=0) : last + 1]]
    weights: dict[int, float] = {}
    for first, last in inner:
        weights |= dict.fromkeys(range(first, last + 1), 1.0)
    for first, last in loops:
        for i in range(first, last + 1) if trips else ():
            weights.setdefault(i, 1 / trips)  # type: ignore[operator]
    return [(weight, code.instructions[i]) for i, weight in sorted(weights.items())]


@dataclass(frozen=True)
class Bound:
    """mix: instructions of a warp by kind. cycles: of a multiprocessor for four warps, by unit.

    rate: in `unit`, TFLOP/s or TB/s, of the whole device; by: the unit that bounds it.
    """

    mix: dict[str, int]
    cycles: dict[str, int]
    by: str
    rate: float
    unit: str


def bound(code: Code, constants: Mapping[str, Any]) -> Bound:
    """constants: compile-time arguments of the kernel."""
    trips = None
    if constants.get("CHANNELS") and constants.get("BLOCK_K"):
        trips = math.ceil(constants["CHANNELS"] / constants["BLOCK_K"])
    counted = working(code, trips)
    flops = tensor = shared = moved = 0.0
    mix: Counter[str] = Counter()
    for times, x in counted:
        mix[_kind(x)] += times  # type: ignore[assignment]
        if product := _PRODUCT.match(x.opcode):
            width, depth = int(product[1]), int(product[2])
            flops += times * 2 * 64 * width * depth
            # the second factor is in shared memory, the first there or in registers
            first = 64 if x.operands.split(", ")[1].startswith("gdesc") else 0
            shared += times * ITEM * depth * (width + first)
        elif x.name in ("LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS"):
            shared += times * WARPS * LANES * x.lane_bytes
        elif x.name in _GLOBAL:
            moved += times * WARPS * LANES * x.lane_bytes
    tensor = flops / TENSOR_FLOPS
    issue = sum(times for times, _ in counted)
    mufu = MUFU_CYCLES * sum(times for times, x in counted if x.name == "MUFU")
    cycles = {"issue": issue, "mufu": mufu, "tensor": tensor, "shared": shared / SHARED_BYTES}
    by = max(cycles, key=lambda unit: cycles[unit])
    amount = (flops if flops else moved) * useful(constants)
    rate = amount / max(1.0, cycles[by]) * MULTIPROCESSORS * CLOCK / 1e12
    whole = {unit: round(x) for unit, x in cycles.items()}
    parts = {kind: round(n) for kind, n in sorted(mix.items())}
    return Bound(parts, whole, by, round(rate, 1 if flops else 2), "TFLOP/s" if flops else "TB/s")


def useful(constants: Mapping[str, Any]) -> float:
    """The share of a tile's columns that are not padding; edges of a problem are not counted."""
    if "DIM" in constants:
        return constants["DIM"] / sum(split(constants["DIM"]))
    if {"BLOCK_C", "BLOCK_G", "WIDTH"} <= constants.keys():
        return min(1.0, constants["BLOCK_G"] * constants["WIDTH"] / constants["BLOCK_C"])
    if {"CHANNELS", "WIDTH"} <= constants.keys():
        return constants["CHANNELS"] / constants["WIDTH"]
    return 1.0


def _kind(x: Instruction) -> str:
    """What an instruction is for."""
    name = x.name
    if name in ("HGMMA", "MUFU"):
        return name.lower()
    if name in ("LDS", "STS", "LDSM", "STSM"):
        return "shared"
    if name in ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG"):
        return "global"
    if name.startswith(("BAR", "WARPGROUP", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "SYNCS")):
        return "wait"
    return "float" if name[0] == "F" and name != "FENCE" else "other"


def listed(modules: Iterable[str]) -> list[Compilation]:
    """The compilations that the table is of; kernels in float32 use no tensor cores."""
    return [
        compilation
        for module in modules
        for compilation in importlib.import_module(
            f"dualdiff_engine.ops.triton.{module}"
        ).compilations()
        if KIND in compilation.name.split()
    ]


def measure(modules: Iterable[str] = MODULES) -> dict[str, dict[str, Any]]:
    """Compilation -> its bound, as a dictionary."""
    found = {}
    for compilation in listed(modules):
        _, cubin = aot.build(compilation, ARCHITECTURE)
        found[compilation.name] = asdict(bound(disassemble(cubin), compilation.constants))
    return found


def worse(found: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """What is missing from the budget, or is bound to be slower than it says."""
    complaints = [f"{name}: not in the table" for name in found if name not in budget]
    complaints += [f"{name}: in the table, gone" for name in budget if name not in found]
    for name in found.keys() & budget.keys():
        new, old = found[name], budget[name]
        if new["rate"] < old["rate"]:
            complaints.append(
                f"{name}: at best {new['rate']} {new['unit']} (bound by {new['by']}, "
                f"{new['cycles'][new['by']]} cycles), was {old['rate']} (bound by {old['by']}, "
                f"{old['cycles'][old['by']]} cycles)"
            )
    return sorted(complaints)


def table(found: Mapping[str, Any]) -> str:
    units = ("issue", "mufu", "tensor", "shared")
    lines = [f"{'kernel':58} {''.join(f'{u:>8}' for u in units)}  {'at best':>14}  by      mix"]
    for name, row in found.items():
        cycles = "".join(f"{row['cycles'][unit]:8}" for unit in units)
        mix = " ".join(f"{kind} {count}" for kind, count in row["mix"].items())
        rate = f"{row['rate']:.4g} {row['unit']}"
        lines.append(f"{name:58} {cycles}  {rate:>14}  {row['by']:7} {mix}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the committed table anew")
    parser.add_argument("--modules", nargs="*", default=list(MODULES), help="only these")
    options = parser.parse_args()
    found = measure(options.modules)
    print(table(found), "", LEGEND, sep="\n")
    budget = json.loads(STATIC.read_text("utf-8")) if STATIC.exists() else {}
    names = {compilation.name for compilation in listed(options.modules)}
    everything = set(options.modules) == set(MODULES)
    if options.update:
        write(found if everything else budget | found)
    elif complaints := worse(
        found, {name: row for name, row in budget.items() if everything or name in names}
    ):
        sys.exit("\n".join(complaints))


def write(found: Mapping[str, Any]) -> None:
    """A line per kernel, so that a change reads as one."""
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in found.items())
    STATIC.write_text(f"{{\n{rows}\n}}\n", "utf-8")


if __name__ == "__main__":
    main()
