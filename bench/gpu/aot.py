"""What a kernel compiles to without a GPU: registers, spills, shared memory, tensor cores.

Every op module lists its compilations for the SD-1.5 shapes in `compilations()`; the gate compares
what they use with a committed budget. `python -m dualdiff_engine.bench.aot` prints the table and
fails on a change for the worse; `--update` writes the budget anew.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dualdiff_engine.ops.proof import first_line
from dualdiff_engine.ops.triton import MODULES
from dualdiff_engine.ops.triton.listing import Compilation

ARCHITECTURES = (80, 89, 90, 100)
# most shared memory of one block, CUDA programming guide, table of compute capabilities
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}
BUDGET = Path(__file__).resolve().parents[2] / "tests" / "ops" / "aot" / "budget.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


@dataclass(frozen=True)
class Usage:
    """What one compilation takes of a multiprocessor; bytes for spills and shared memory."""

    registers: int
    spills: int
    shared: int
    tensor_cores: bool


def build(compilation: Compilation, architecture: int) -> tuple[Usage, bytes]:
    """Compile for an architecture (80: sm_80) -> what it uses, and its machine code."""
    signature, constants = dict(compilation.signature), dict(compilation.constants)
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    # torch allocates on 256 bytes; rows are multiples of 16 bytes at SD shapes
    source = ASTSource(
        compilation.kernel,
        signature,
        constants,
        {(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    config, report = compilation.config, io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(report):
        # the assembler's own words, which Triton would otherwise drop
        knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(
            source,
            target=GPUTarget("cuda", architecture, 32),
            options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        )
    # nothing is assembled where Triton has it in its cache on disk
    words = report.getvalue()
    if "registers" not in words:
        words = assembler_report(built.asm["ptx"], architecture)
    registers, spills = counted(words)
    tensor_cores = bool(_TENSOR_CORE.search(built.asm["ptx"]))
    usage = Usage(registers, spills, built.metadata.shared, tensor_cores)
    return usage, built.asm["cubin"]


def counted(report: str) -> tuple[int, int]:
    """Registers of a thread, and bytes spilled, of an assembler's report."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    return max(registers), sum(spills)


def assembler_report(ptx: str, architecture: int) -> str:
    """What the assembler says of PTX for an architecture (80: sm_80)."""
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    tool = TOOLS / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        words = [str(tool), "-v", f"--gpu-name={target[1]}", str(path), "-o", f"{path}.cubin"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stderr


def measure(modules: Iterable[str] = MODULES) -> dict[str, dict[str, Any]]:
    """ "op name sm_90" -> usage, for every compilation of the modules on every architecture."""
    found = {}
    for module in modules:
        listed = importlib.import_module(f"dualdiff_engine.ops.triton.{module}").compilations()
        for compilation in listed:
            for architecture in ARCHITECTURES:
                usage, _ = build(compilation, architecture)
                if usage.shared > SHARED_LIMIT[architecture]:
                    raise AssertionError(f"{compilation.name}: {usage.shared} B shared memory")
                if compilation.tensor_cores and not usage.tensor_cores:
                    raise AssertionError(f"{compilation.name}: no tensor cores on {architecture}")
                found[f"{compilation.name} sm_{architecture}"] = asdict(usage)
    return found


# candidates of a module that the gate compiles at most
SAMPLED = 32


def candidates(module: str) -> list[Compilation]:
    """What tuning may choose besides the defaults, in bf16: each once, at the first such shape."""
    home = importlib.import_module(f"dualdiff_engine.ops.triton.{module}")
    found: dict[tuple[str, str], Compilation] = {}
    for x in home.compilations(every_candidate=True):
        if "bf16" in x.name.split():
            found.setdefault((x.kernel.__name__, str(x.config)), x)
    for x in home.compilations():
        found.pop((x.kernel.__name__, str(x.config)), None)
    return list(found.values())[:: math.ceil(len(found) / SAMPLED) or 1]


def unfit(listed: Iterable[Compilation], architecture: int = 90) -> list[str]:
    """What cannot win on an architecture: does not compile, does not fit, uses no tensor cores."""
    complaints = []
    for compilation in listed:
        label = f"{compilation.name} {compilation.config}"
        try:
            usage, _ = build(compilation, architecture)
        # the compiler raises what it likes
        except Exception as error:
            complaints.append(f"{label}: {first_line(error)}")
            continue
        if usage.shared > SHARED_LIMIT[architecture]:
            complaints.append(f"{label}: {usage.shared} B of shared memory")
        if compilation.tensor_cores and not usage.tensor_cores:
            complaints.append(f"{label}: no tensor cores")
    return complaints


def worse(found: Mapping[str, Any], budget: Mapping[str, Any]) -> list[str]:
    """What is missing from the budget, or uses more than it allows."""
    complaints = [f"{name}: not in the budget" for name in found if name not in budget]
    complaints += [f"{name}: in the budget, gone" for name in budget if name not in found]
    for name in found.keys() & budget.keys():
        for part in ("registers", "spills", "shared"):
            if found[name][part] > budget[name][part]:
                complaints.append(f"{name}: {part} {found[name][part]} > {budget[name][part]}")
    return sorted(complaints)


def table(found: Mapping[str, Any]) -> str:
    lines = [f"{'kernel':64} {'regs':>5} {'spills':>7} {'shared':>8}  tensor cores"]
    for name, usage in found.items():
        cores = "yes" if usage["tensor_cores"] else "-"
        lines.append(
            f"{name:64} {usage['registers']:5} {usage['spills']:7} {usage['shared']:8}  {cores}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the budget anew")
    parser.add_argument("--modules", nargs="*", default=list(MODULES), help="only these")
    options = parser.parse_args()
    found = measure(options.modules)
    print(table(found))
    budget = json.loads(BUDGET.read_text("utf-8"))
    if options.update:
        everything = set(options.modules) == set(MODULES)
        kept = found if everything else budget | found
        BUDGET.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
        return
    if complaints := worse(found, budget):
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
