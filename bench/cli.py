"""`dualdiff-bench`: the engine against the released computation and against plain diffusers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualdiff_engine.errors import DualDiffError, SettingsError
from dualdiff_engine.settings import DISTILLED, PRESETS

if TYPE_CHECKING:
    import torch

    from dualdiff_engine.bench.step.case import Case
    from dualdiff_engine.bench.step.workers import Entry

PEER_NAMES = (
    "released", "diffusers", "eager", "compiled", "xformers", "engine", "engine-fresh",
    "engine-graph", "engine-triton-graph", "engine-triton", "engine-native", "engine-xformers",
    "engine-onednn", "engine-widened", "engine-reference", "engine-onnxruntime", "engine-tensorrt",
    "engine-sdpa-flash", "engine-sdpa-cudnn", "engine-sdpa-efficient", "engine-triton-composed",
    *(f"engine-only-{op}" for op in (
        "linear", "branch_linear", "attention", "exchange", "group_norm_silu", "geglu",
        "guided_step",
    )),
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "dualdiff-bench",
        description="Time one denoiser step of a batch of pairs: the engine, the released "
        "computation and plain diffusers, interleaved in one run.",
        epilog="dualdiff-bench ops: time every op of a step. dualdiff-bench roofline: count "
        "the least time that a step can take. Each has its own --help.",
    )
    p.add_argument("--batch", type=int, default=32, help="pairs per step (default 32)")
    p.add_argument(
        "--model", choices=("demo", "small", "sd15"), help="default: sd15 on a GPU, else demo"
    )
    p.add_argument(
        "--calls",
        "--steps",
        dest="calls",
        type=int,
        help="denoiser calls of a run (default 100, with background 50)",
    )
    p.add_argument(
        "--preset",
        # all peers run with guidance
        choices=tuple(name for name in PRESETS if name != DISTILLED),
        help="as many calls as a preset makes on SD-1.5 (released: 101, with background 51)",
    )
    _add_case(p)
    _add_whole(p)
    p.add_argument("--output-json", type=Path, metavar="FILE", help="write the record")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw the record (png, svg, pdf)")
    return p


def _add_case(p: argparse.ArgumentParser) -> None:
    p.add_argument("--rounds", type=int, default=3, help="timed steps per peer (default 3)")
    p.add_argument("--size", type=int, help="pixels (default: the model's own)")
    p.add_argument("--guidance", type=float, default=2.5, help="guidance scale, above 1")
    p.add_argument(
        "--background", action=argparse.BooleanOptionalAction, default=False,
        help="with background compensation; fixed noise, so the background pass is reused",
    )  # fmt: skip
    p.add_argument("--dtype", help="of engine and diffusers: one of, or several with commas, "
                   f"{', '.join(DTYPES)} (default: bfloat16 on a GPU, else float32)")  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:0, …")
    p.add_argument(
        "--peers",
        help=f"any of {', '.join(PEER_NAMES)} (default: released,diffusers,engine; whole pairs are "
        "drawn by released and by engines)",
    )
    p.add_argument("--seed", type=int, default=0)


def _add_whole(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--end-to-end", action="store_true",
        help="whole pairs, from prompts to PNG files: seconds per pair, stage by stage",
    )  # fmt: skip
    p.add_argument(
        "--timed-calls", type=int, metavar="N",
        help="with --end-to-end: make only N calls of a schedule and count them all (default: "
        "every call; 3 for sd15 on a CPU)",
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["ops"]:
            from dualdiff_engine.bench.op import bench as op_bench

            op_bench.main(words[1:])
        elif words[:1] == ["roofline"]:
            from dualdiff_engine.bench.op import roofline

            roofline.main(words[1:])
        else:
            options = parser().parse_args(words)
            (_run_whole if options.end_to_end else _run)(options)
    except DualDiffError as error:
        sys.exit(_fail(str(error)))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> int:
    print(f"dualdiff-bench: {message}", file=sys.stderr)
    return 2


def _names(given: str, known: Sequence[str], what: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise SettingsError(f"no {what} {unknown[0]!r}: choose one of {', '.join(known)}")
    return names


def _case(options: argparse.Namespace, on_gpu: bool) -> Case:
    """The case that the options describe. Raises SettingsError."""
    from dualdiff_engine.bench.step.case import MODELS, SCALE, Case, calls_of

    model = options.model or ("sd15" if on_gpu else "demo")
    scale = SCALE[model]
    for name, low in (("batch", 1), ("rounds", 1), ("seed", 0)):
        if getattr(options, name) < low:
            raise SettingsError(f"--{name} must be at least {low}")
    calls = options.calls
    if calls is None:
        calls = calls_of(options.preset, options.background)
    size = options.size if options.size is not None else MODELS[model]["sample_size"] * scale
    if not 1 <= calls <= 1000 or not 64 <= size <= 2048 or size % 8:
        raise SettingsError("--calls must be 1 to 1000, --size a multiple of 8 from 64 to 2048")
    if options.guidance <= 1:
        raise SettingsError("--guidance must be above 1, because all peers run with guidance")
    return Case(
        model=model,
        batch=options.batch,
        steps=calls,
        height=size // scale,
        width=size // scale,
        guidance=options.guidance,
        background=options.background,
        seed=options.seed,
        scale=scale,
        preset=options.preset if options.calls is None else None,
    )


def _entries(options: argparse.Namespace, on_gpu: bool) -> list[Entry]:
    """The rows of the table: each peer in each dtype. Raises SettingsError."""
    from dualdiff_engine.bench.step.workers import Entry

    dtypes = _names(options.dtype or ("bfloat16" if on_gpu else "float32"), DTYPES, "dtype")
    if not on_gpu and "float16" in dtypes:
        raise SettingsError("float16 on a CPU is emulated and very slow: use bfloat16")
    peers = _names(options.peers or "released,diffusers,engine", PEER_NAMES, "peer")
    if "engine-fresh" in peers and not options.background:
        raise SettingsError("engine-fresh needs --background; without it, it equals engine")
    # the released program knows fp32 only
    return [
        Entry(peer, dtype)
        for peer in peers
        for dtype in (["float32"] if peer == "released" else dtypes)
    ]


def _run(options: argparse.Namespace) -> None:
    if options.timed_calls is not None:
        raise SettingsError("--timed-calls goes with --end-to-end")
    _check_outputs(options)
    import torch

    from dualdiff_engine.bench.step import measure, peers, report

    device, case = _device_and_case(options)
    entries = _entries(options, device.type == "cuda")
    for entry in entries:
        peers.require(entry.peer, device, getattr(torch, entry.dtype))
    record = measure.run(case, entries, device=str(device), rounds=options.rounds, say=_sayer())
    lines = ["", report.headline(record), "", report.text_table(record), ""]
    print("\n".join([*lines, report.LEGEND, *report.preparations(record)]))
    if options.output_json:
        report.write_json(record, options.output_json)
    if options.plot:
        report.write_plot(record, options.plot)


def _run_whole(options: argparse.Namespace) -> None:
    for flag in ("calls", "plot"):
        if getattr(options, flag) is not None:
            raise SettingsError(f"--end-to-end does not take --{flag}: the preset says the calls")
    if options.timed_calls is not None and options.timed_calls < 2:
        raise SettingsError("--timed-calls must be at least 2: the first call is not timed")
    _check_outputs(options)
    import torch

    from dualdiff_engine.bench import end_to_end
    from dualdiff_engine.bench.step import peers, report

    options.peers = options.peers or "released,engine"
    _names(options.peers, end_to_end.PEERS, "peer that draws whole pairs")
    options.preset = options.preset or "released"
    device, case = _device_and_case(options)
    on_gpu = device.type == "cuda"
    entries = _entries(options, on_gpu)
    for entry in entries:
        peers.require(entry.peer, device, getattr(torch, entry.dtype))
    timed = end_to_end.timed_calls(case, options.timed_calls, on_gpu=on_gpu)
    record = end_to_end.run(
        case, entries, device=str(device), rounds=options.rounds, timed=timed, say=_sayer()
    )
    print("\n".join(["", end_to_end.headline(record), "", end_to_end.table(record)]))
    print(end_to_end.LEGEND)
    if options.output_json:
        report.write_json(record, options.output_json)


def _check_outputs(options: argparse.Namespace) -> None:
    for path in (options.output_json, options.plot):
        if path is not None and not path.parent.is_dir():
            raise SettingsError(f"no folder {str(path.parent)!r} for {path.name}: create it first")


def _device_and_case(options: argparse.Namespace) -> tuple[torch.device, Case]:
    from dualdiff_engine.bench.step.case import WHY
    from dualdiff_engine.device import device_of

    device = device_of(options.device)
    on_gpu = device.type == "cuda"
    case = _case(options, on_gpu)
    if options.model is None:
        reason = "" if on_gpu else " (no GPU; --model sd15 runs it)"
        print(f"preset {case.model}: {WHY[case.model]}{reason}", flush=True)
    return device, case


def _sayer() -> Callable[[str], None]:
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {line}", file=sys.stderr, flush=True)

    return say


if __name__ == "__main__":
    main()
