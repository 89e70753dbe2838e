"""One folder that runs anywhere: graphs, adapters, tokenizer, scheduler, manifest of hashes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dualdiff_engine
from dualdiff_engine.base_model import BUNDLE, blamed_on, first_line
from dualdiff_engine.engine import Engine
from dualdiff_engine.errors import BackendError, SettingsError
from dualdiff_engine.export.folder.artefact import ADAPTERS, read_artefacts
from dualdiff_engine.export.folder.folded import read_adapters
from dualdiff_engine.export.graph import exchange_operator as exchange
from dualdiff_engine.export.graph import space, write
from dualdiff_engine.export.graph.probe import PROMPTS
from dualdiff_engine.export.graph.progress import Say, part
from dualdiff_engine.export.graph.validate import REPORT
from dualdiff_engine.export.graph.write import Exporter, ExportOptions
from dualdiff_engine.export.run.bundle_parts import BundledBase
from dualdiff_engine.export.trt import engine_file
from dualdiff_engine.files import sha256_of

BUNDLE_FORMAT = 1
# what a tokenizer, scheduler or network is configured by
_CONFIGS = ("tokenizer/*", "scheduler/*.json", "unet/config.json", "vae/config.json")
# of a bundle.json: a large one has a hundred files
_MOST_BYTES = 16 << 20
_AGAIN = "copy the whole {} again, or write it again with `dualdiff export {}`"
# what readers of a bundle.json take from it, next to "files"
_FIELDS = {"first": str, "adapters": dict, "base": dict, "max_batch": int}


def write_bundle(
    base: str | Path,
    adapters: Sequence[str | Path],
    out: str | Path,
    options: ExportOptions | None = None,
    *,
    allow_pickle: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Write one folder that `Engine.from_bundle` runs without the base model.

    Args:
        base: a diffusers Stable Diffusion folder or hub id.
        adapters: adapter files or folders; the bundle starts with the first.
        out: the new folder, absent or empty; it gets its name when all went well.
        options: see `graph.write.Options`; by default float32, opset 23.
        allow_pickle: also open `.bin` adapters.
        say: called with lines of progress: what is needed and free, each part's begin and end.

    Returns:
        The manifest, as in `bundle.json`.

    Raises:
        SettingsError: no adapter, wrong options, or `out` is not empty.
        OutputError: the disk has less room than the bundle may take.
        BackendError: a graph differs from the engine's network by more than its tolerance.
        AdapterError: an adapter is not valid or does not fit the base.
        BaseModelError: the base model is missing, incomplete or not supported.
    """
    if not adapters:
        raise SettingsError("a bundle needs at least one adapter: pass one")
    with write.new_folder(Path(out)) as folder:
        with Engine.from_pretrained(
            base, adapter=adapters[0], dtype="float32", device="cpu", allow_pickle=allow_pickle
        ) as engine:
            first = engine.active_adapter
            assert first is not None
            for adapter in adapters[1:]:
                engine.load_adapter(adapter, allow_pickle=allow_pickle)
            engine.set_adapter(first)
            write.write_folder(engine, folder, options or ExportOptions(), say)
            _copy_configs(engine.base.folder, folder)
            _check_tokens(engine, folder)
        with part(say, "hashing files"):
            return write_manifest(folder, first)


def _check_tokens(engine: Engine, folder: Path) -> None:
    """The bundle's own tokenizer, against the base's. Raises BackendError."""
    bundled = BundledBase(folder, read_artefacts(folder)).load_tokenizer()
    for prompt in PROMPTS:
        expected = engine.text_encoder.tokenize([prompt])
        found = bundled(prompt, padding="max_length", max_length=expected.shape[1]).input_ids
        if bundled.model_max_length != expected.shape[1] or [found] != expected.tolist():
            raise BackendError(
                f"the bundle's tokenizer reads {prompt!r} in another way than the base model's: "
                "the bundle was not kept; please report this"
            )


def _copy_configs(base: Path, folder: Path) -> None:
    for pattern in _CONFIGS:
        for source in base.glob(pattern):
            if source.suffix in (".json", ".txt", ".model"):
                target = folder / source.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


def _held(guidance: float | None) -> dict[str, float]:
    """What a manifest says of an adapter that holds guidance: no unconditional rows are needed."""
    return {} if guidance is None else {"held_guidance": guidance}


def write_manifest(folder: Path, first: str | None = None) -> dict[str, Any]:
    """(Re)write the manifest from what lies in the folder.

    Engines have manifests of their own: they may be built, and built again, after this.
    """
    path = folder / BUNDLE
    if first is None:
        first = read_manifest(folder)["first"]
    graphs = read_artefacts(folder)
    one = next(iter(graphs.values()))
    adapters = read_adapters(folder, graphs)
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != path and not engine_file.belongs(file)
    }
    manifest = {
        "format": BUNDLE_FORMAT,
        "version": dualdiff_engine.__version__,
        "base": asdict(one.base),
        "first": first,
        "adapters": {
            name: {
                **{key: getattr(adapter.summary, key) for key in ("sha256", "background", "rank")},
                "prompts": asdict(adapter.prompts),
                **_held(adapter.summary.held_guidance),
            }
            for name, adapter in adapters.items()
        },
        "text_length": one.tokens,
        "precision": one.precision,
        "opset": one.opset,
        "latent_size": [one.height, one.width],
        "dynamic_size": one.dynamic_size,
        "max_batch": one.max_batch,
        "files": files,
    }
    path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
    return manifest


def intact(folder: Path, kind: str = "bundle") -> AbstractContextManager[None]:
    """Within the block, what a damaged file makes a library raise becomes one BackendError."""
    return blamed_on(
        folder, _AGAIN.format(kind, "bundle" if kind == "bundle" else "onnx"), BackendError
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises BackendError when there is none, or it is of another release."""
    path = folder / BUNDLE
    try:
        # not a pipe, which would wait for ever
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"{BUNDLE} is missing or not a manifest")
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["format"] != BUNDLE_FORMAT:
            raise BackendError(
                f"{path} has format {manifest['format']}, this release reads "
                f"{BUNDLE_FORMAT}: write the "
                "bundle again"
            )
        for name, about in manifest["files"].items():
            if not isinstance(about["bytes"], int) or not isinstance(about["sha256"], str):
                raise TypeError(name)
        for name, kind in _FIELDS.items():
            if not isinstance(manifest[name], kind):
                raise TypeError(name)
        known = manifest["adapters"]
        if not all(isinstance(about["background"], bool) for about in known.values()):
            raise TypeError("adapters")
        if manifest["first"] not in known:
            raise KeyError(manifest["first"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackendError(
            f"Invalid bundle: {folder} ({type(error).__name__}: {first_line(error)}); recreate it "
            "with `dualdiff export bundle`"
        ) from error
    return dict(manifest)


def check_files(folder: Path, manifest: dict[str, Any], *, hashes: bool) -> int:
    """Check that every file is there and unchanged, and no other. Returns their number.

    hashes: also those of weights; of other files, which are small, they are always compared. A file
    may be a symbolic link: stores and mounted volumes are made of them.
    Raises BackendError naming the first that is not. Nothing is written.
    """
    for name, about in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise BackendError(
                f"{folder}/{BUNDLE} lists {name!r} outside the bundle folder: do not use this "
                "bundle"
            )
        if not path.is_file():
            raise BackendError(f"{folder} has no {name}: copy the whole bundle again")
        changed = path.stat().st_size != about["bytes"]
        if not changed and (hashes or path.suffix != ".safetensors"):
            changed = sha256_of(path) != about["sha256"]
        if changed:
            raise BackendError(
                f"{path} differs from the file that the bundle was written with: copy the bundle "
                "again"
            )
    _refuse_unlisted(folder, manifest)
    return len(manifest["files"])


def _refuse_unlisted(folder: Path, manifest: dict[str, Any]) -> None:
    """Raise BackendError naming a file that the manifest does not know.

    A graph, an adapter or a tokenizer's file that is only there would be used unchecked. Engines
    have manifests of their own, at the top of the folder. Nothing reads hidden files, which hubs,
    mounted volumes and file managers leave.
    """
    listed = {Path(name) for name in manifest["files"]} | {Path(BUNDLE)}
    folders = {parent for name in listed for parent in name.parents}
    # only what the manifest names is entered: links to folders may lead in circles
    for place in sorted(folders):
        for path in sorted((folder / place).iterdir()):
            name = place / path.name
            if path.name.startswith(".") or name in listed or name in folders:
                continue
            if place == Path() and engine_file.belongs(path):
                continue
            raise BackendError(
                f"{folder}/{BUNDLE} does not list {name.as_posix()}: delete it, or write the "
                "bundle again if it belongs there"
            )


def add_adapter(
    base: str | Path,
    adapter: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    allow_pickle: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Fold an adapter, validate it, and add it to an existing export or bundle.

    Graphs that it needs and that do not exist yet are traced. Returns its part of the report. If
    a graph misses its tolerance, the folder is left as it was.
    Raises BackendError, AdapterError, SettingsError, OutputError.
    """
    folder = Path(folder)
    if (folder / BUNDLE).exists():
        # the manifest is written again from what lies there, which must be what it listed
        check_files(folder, read_manifest(folder), hashes=False)
    graphs = read_artefacts(folder)
    one = next(iter(graphs.values()))
    with Engine.from_pretrained(base, dtype="float32", device="cpu") as engine:
        if engine.base.sha256 != one.base.sha256:
            raise BackendError(
                f"{folder} was exported from another base model ({one.base.source}, sha256 "
                f"{one.base.sha256[:12]}…): pass that base model"
            )
        name = engine.load_adapter(adapter, name, allow_pickle=allow_pickle)
        scale = engine.base.pixels_per_latent
        options = ExportOptions(
            one.precision, one.opset, one.height * scale, one.width * scale, one.dynamic_size,
            one.max_batch, exchange_operator=any(map(exchange.is_kept, folder.glob("*.onnx"))),
        )  # fmt: skip
        exporter = Exporter(engine, folder, options, say)
        if (folder / ADAPTERS / f"{exporter.name}.safetensors").exists():
            raise SettingsError(
                f"{folder} already holds an adapter {exporter.name!r}: pass another name"
            )
        space.require(folder, exporter.expected_bytes(with_base=False), say)
        report = _or_nothing(folder, exporter)
    if (folder / BUNDLE).exists():
        write_manifest(folder)
    return report


def _or_nothing(folder: Path, exporter: Exporter) -> dict[str, Any]:
    before = {path for path in folder.rglob("*") if path.is_file()}
    report = (folder / REPORT).read_bytes()
    try:
        return exporter.add_adapter()
    except BaseException:
        for path in folder.rglob("*"):
            if path.is_file() and path not in before:
                path.unlink()
        (folder / REPORT).write_bytes(report)
        raise
