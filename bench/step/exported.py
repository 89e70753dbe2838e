"""Exports for the peers that run one: made before anything is timed, in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from dualdiff_engine.bench.step import random_base
from dualdiff_engine.bench.step.case import Case, adapter_of
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import DualDiffError

BASE, GRAPHS = "base", "graphs"


def prepare(case: Case, dtype: str, backend: str, folder: Path) -> dict[str, float]:
    """Write a case's base model and graphs into a folder, as `dualdiff export` does.

    Validated like every export. backend tensorrt also builds engines for this GPU. Returns the
    seconds that each part took. Raises DualDiffError.
    """
    context = multiprocessing.get_context("spawn")
    # what tracing takes and leaves behind is no part of any peer's memory
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(_prepare, case, dtype, backend, folder).result()
        except BrokenProcessPool as error:
            raise DualDiffError(
                f"the export for {backend} died; out of memory is the usual reason: --model small "
                "needs less"
            ) from error


def _prepare(case: Case, dtype: str, backend: str, folder: Path) -> dict[str, float]:
    from dualdiff_engine.export.graph.write import ExportOptions, export_onnx

    start = time.perf_counter()
    base = random_base.write_base(folder / BASE, case.model, case.seed)
    adapter = adapter_of(case.model, case.seed, background=case.background)
    options = ExportOptions(
        precision=dtype,
        height=case.scale * case.height,
        width=case.scale * case.width,
        max_batch=case.batch,
        batches=(1,),
    )
    seconds = {"base": time.perf_counter() - start}
    start = time.perf_counter()
    with Engine.from_pretrained(base, device="cpu", dtype="float32") as engine, torch.no_grad():
        engine.keep_adapter(adapter, "bench")
        export_onnx(engine, folder / GRAPHS, options)
    seconds["export"] = time.perf_counter() - start
    if backend == "tensorrt":
        from dualdiff_engine.export.trt.build import BuildOptions, build

        start = time.perf_counter()
        build(folder / GRAPHS, BuildOptions(batches=(case.batch,)))
        seconds["build"] = time.perf_counter() - start
    return seconds
