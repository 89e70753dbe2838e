"""Records -> what people read: a table, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualdiff_engine.errors import SettingsError
from dualdiff_engine.evaluation.report import markdown_table

Record = dict[str, Any]
COLUMNS = (
    "peer", "dtype", "ms/step p50", "p20–p80", "pairs/s", "speed-up", "TFLOP/step", "GFLOP/s",
    "of product rate", "peak GiB", "error",
)  # fmt: skip

LEGEND = """\
released: one pair per call, branches in turn, LoRA next to the weights, background pass every step
diffusers: the same UNet uncoupled, all rows in one batch (a floor; its result is another one)
engine: folded and coupled, the batch at once; with a background its shares are computed beforehand
engine-onnxruntime, engine-tensorrt: the engine around the same network, exported
pairs/s: denoising only, schedule length times the median step; error: relative L2 of the guided
noise to released in fp32; speed-up: median over rounds of released's time over the peer's; where
released did not run, the first row's median over the peer's"""


def cells(record: Record) -> list[list[str]]:
    """One row of text per peer, in the order of COLUMNS."""
    rows = []
    first = record["peers"][0]["ms_per_step"]["p50"]
    for row in record["peers"]:
        ms, error = row["ms_per_step"], row["error_to_released"]
        speedup = row["speedup_over_released"] or first / ms["p50"]
        rows.append(
            [
                row["peer"],
                row["dtype"],
                f"{ms['p50']:,.0f}",
                f"{ms['p20']:,.0f}–{ms['p80']:,.0f}",
                f"{row['pairs_per_s']:.3g}",
                f"{speedup:.2f}x",
                f"{row['flops_per_step'] / 1e12:.3f}",
                f"{row['flops_per_s'] / 1e9:,.0f}",
                f"{row['share_of_product_rate']:.0%}",
                f"{row['peak_bytes'] / 2**30:.2f}",
                # the uncoupled network is another function: no error to speak of
                "-" if error is None or row["peer"] == "diffusers" else f"{error:.1e}",
            ]
        )
    return rows


def headline(record: Record) -> str:
    """What was run, on what, in one line."""
    case = record["case"]
    background = "with background" if case["background"] else "plain"
    # older records are of Stable Diffusion's own VAE
    height, width = (case[side] * case.get("scale", 8) for side in ("height", "width"))
    # older records do not say
    instructions = f"{record['instructions']}, " if "instructions" in record else ""
    rates = ", ".join(f"{k} {v / 1e9:,.0f}" for k, v in record["product_flops_per_s"].items())
    preset = f" (preset {case['preset']})" if case.get("preset") else ""
    return (
        f"{case['model']}, {case['batch']} pair(s), {height}x{width} px, "
        f"{background}, guidance {case['guidance']:g}, schedule of {case['steps']} calls{preset}; "
        f"{record['device_name']}, {record['cores']} cores, {instructions}"
        f"torch {record['versions']['torch']}, commit {record['commit']}; "
        f"matrix products: {rates} GFLOP/s"
    )


def text_table(record: Record) -> str:
    rows = [list(COLUMNS), *cells(record)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def preparations(record: Record) -> list[str]:
    """A line for every peer that something was made for: outside of every time above."""
    return [
        f"before {row['peer']} {row['dtype']}, not in its times: "
        + ", ".join(f"{part} {seconds:.0f} s" for part, seconds in row["prepared_s"].items())
        for row in record["peers"]
        if row.get("prepared_s")
    ]


def step_table(record: Record) -> str:
    return markdown_table([COLUMNS, *cells(record)], texts=2)


def export_table(record: Record) -> str:
    """What `bench.export_full_size` found, a line for every graph."""
    seconds = {row["part"]: row["seconds"] for row in record["parts"]}
    peaks = {row["part"]: row["peak_bytes"] / 2**30 for row in record["parts"]}
    head = ["graph", "nodes", "attentions", "traced, s", "validated, s", "peak GiB", "error",
            "allowed", "`onnx.checker`"]  # fmt: skip
    rows = [head]
    for name, graph in record["graphs"].items():
        parts = [f"{verb} {name}" for verb in ("tracing", "checking", "validating")]
        rows.append(
            [
                f"`{name}`",
                f"{graph['nodes']}",
                f"{graph['attentions']}",
                *(f"{seconds[part]:.0f}" for part in (parts[0], parts[-1])),
                f"{max(peaks[part] for part in parts):.1f}",
                f"{max(case['error'] for case in graph['cases']):.1e}",
                f"{graph['tolerance']:.1e}",
                record["checker"][name],
            ]
        )
    return markdown_table(rows)


def export_headline(record: Record) -> str:
    """Of all graphs together; what it ran on; what TensorRT-RTX made of it."""
    versions, rtx = record["versions"], record.get("tensorrt_rtx")
    size = sum(record["files"].values()) / 1e9
    said = (
        f"Float32, {record['pixels']}², opset {record['options']['opset']}: in all "
        f"{record['seconds']:.0f} s ({record['cpu_seconds']:.0f} s of CPU time), at most "
        f"{record['peak_bytes'] / 2**30:.1f} GiB resident, files of {size:.1f} GB. "
        f"{record['device_name']}, {record['cores']} core(s), torch {versions['torch']}, "
        f"{record['runtime']}, onnx {versions['onnx']}, commit {record['commit']}."
    )
    return said if rtx is None else f"{said}\n\n{_rtx_line(rtx, versions)}"


def _rtx_line(rtx: Record, versions: Record) -> str:
    about = (
        f"TensorRT-RTX {versions['tensorrt-rtx-cu13']}, the denoiser alone in {rtx['precision']}"
    )
    if "error" in rtx:
        return f"{about}: {rtx['error']}"
    ranges = ", ".join(f"{low}–{high}" if low < high else f"{low}" for low, high in rtx["profiles"])
    (seconds,) = (row["seconds"] for row in rtx["parts"] if row["part"] == "building")
    return (
        f"{about}, for compute capability {rtx['target']}, profiles of {ranges} pairs: all "
        f"{rtx['attentions']} attentions fused, a plan of {rtx['plan_bytes'] / 1e9:.2f} GB built "
        f"in {seconds:.0f} s, at most {rtx['peak_bytes'] / 2**30:.1f} GiB resident."
    )


def write_json(record: Record, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def write_plot(record: Record, path: Path) -> None:
    """Milliseconds per step of every peer, with the p20-p80 span."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingsError("--plot needs matplotlib: pip install dualdiff-engine[plot]") from error
    peers = record["peers"]
    middle = [row["ms_per_step"]["p50"] for row in peers]
    spans = [
        [m - row["ms_per_step"]["p20"] for m, row in zip(middle, peers, strict=True)],
        [row["ms_per_step"]["p80"] - m for m, row in zip(middle, peers, strict=True)],
    ]
    figure = Figure(figsize=(7, 0.6 + 0.6 * len(peers)), layout="constrained")
    axes = figure.add_subplot()
    bars = axes.barh(
        [f"{r['peer']} {r['dtype']}" for r in peers], middle, xerr=spans, color="#4c78a8"
    )
    axes.bar_label(bars, [f"{m:,.0f} ms" for m in middle], padding=6)
    axes.invert_yaxis()
    axes.set_xlabel("ms per denoiser step of the whole batch, median (p20 to p80)")
    axes.set_xmargin(0.15)
    axes.set_title(headline(record).split(";")[0], fontsize=9)
    figure.savefig(path, dpi=120)
