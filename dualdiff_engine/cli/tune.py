"""`dualdiff tune`: measure which backend is fastest here for each call of a denoiser step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualdiff_engine.cli.doctor import print_table
from dualdiff_engine.cli.options import Base, Device, Dtype, Quiet

if TYPE_CHECKING:
    from dualdiff_engine.ops.measure import OpCall

TimeLimit = Annotated[float, typer.Option(min=1, help="Seconds; what is left keeps its choice.")]
MaxBatch = Annotated[int | None, typer.Option(min=1, help="Pairs computed at once, as drawn with.")]


def tune(
    base: Base = None,
    batch: MaxBatch = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    time_limit: TimeLimit = 60.0,
    quiet: Quiet = False,
) -> None:
    """Measure which backend is fastest here for each operation; later runs use the result.

    Without --base, the demo model is measured.
    """
    from tqdm import tqdm

    from dualdiff_engine.base_model import BaseModel
    from dualdiff_engine.demo.presets import BASE
    from dualdiff_engine.device import device_of, dtype_of
    from dualdiff_engine.model import tuning
    from dualdiff_engine.ops import measure, record

    where = device_of(device)
    kind = dtype_of(dtype, where)
    model = BaseModel(base or str(BASE))
    tokens = model.load_text()[0].model_max_length
    network = tuning.Network(model.unet_config, model.sample_size, tokens)
    pairs = batch or (32 if where.type == "cuda" else 4)
    with tqdm(unit="call", disable=quiet, desc="tune") as bar:

        def report(done: int, total: int, call: OpCall, seconds: Mapping[str, float]) -> None:
            bar.total = total
            bar.update()

        found = tuning.tune(network, where, kind, pairs, time_limit, report)
    if quiet:
        return
    print_table((name, _times(seconds, measure.fastest)) for name, seconds in found.seconds.items())
    total = len({call for places in found.places.values() for x in places.values() for call in x})
    typer.echo(f"{len(found.seconds)} of {total} calls measured, kept in {record.folder()}")


def _times(seconds: Mapping[str, float], fastest: Any) -> str:
    chosen = fastest(seconds)
    ordered = sorted(seconds, key=lambda name: (name != chosen, seconds[name]))
    return ", ".join(f"{name} {seconds[name] * 1e3:.3f} ms" for name in ordered)


def continued(root: Path, backend: str, device: str, dtype: str) -> str | Mapping[str, str]:
    """The backend to draw with; with `auto`, a folder that is continued keeps its own choice."""
    from dualdiff_engine.device import device_of, dtype_of
    from dualdiff_engine.errors import BackendError
    from dualdiff_engine.folder_writer import last_recipe
    from dualdiff_engine.ops import BACKENDS, bind

    recipe = last_recipe(root) if backend == "auto" else None
    recorded = (recipe or {}).get("backends")
    if (
        recipe is None
        or not isinstance(recorded, dict)
        or not set(recorded.values()) <= {*BACKENDS}
    ):
        return backend
    where = device_of(device)
    kind = dtype_of(dtype, where)
    if (recipe["device"], recipe["dtype"]) != (str(where), str(kind).removeprefix("torch.")):
        return backend
    try:
        bind(recorded, device=where, dtype=kind)
    except BackendError as error:
        typer.echo(f"dualdiff: {root} was drawn with other kernels: {error}", err=True)
        return backend
    return recorded
