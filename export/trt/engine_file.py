"""Engine files: a plan, and a manifest that is checked before the plan is opened.

A plan is code for a GPU, and TensorRT does not protect itself against a manipulated one. So a plan
is only loaded if this user built it, which a keyed hash in the manifest proves, or if the caller
trusts it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dualdiff_engine.errors import BackendError
from dualdiff_engine.files import sha256_of, write_whole

ENGINE_FORMAT = 1
# a manifest is a page; more is not one
MOST_MANIFEST_BYTES = 1 << 20
SUFFIX, TIMING_CACHE = ".plan", "timing.cache"
KEY_BYTES = 32


@dataclass(frozen=True)
class Manifest:
    """What an engine was built from, by what, and for which GPUs.

    targets: compute capabilities ("9.0"). gpu: its name where the engine fits only that kind.
    profiles: [least, most] pairs each. height, width: latent size. weights_sha256: of the adapter's
    values in it, by the names of their initializers. plugins: operators that our kernels compute.
    """

    graph: str
    flavour: str
    version: str
    targets: list[str]
    gpu: str
    graph_sha256: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    precision: str
    height: int
    width: int
    profiles: list[list[int]]
    refittable: bool
    weights_sha256: str
    plugins: list[str] = field(default_factory=list)
    format: int = ENGINE_FORMAT


def name_of(graph: str, targets: Sequence[str]) -> str:
    """The file of a graph's engine for some targets."""
    return f"{graph}.sm_{'_'.join(target.replace('.', '') for target in targets)}{SUFFIX}"


def this_gpu(required: bool = True) -> str:
    """Compute capability of the current GPU, "9.0". Raises BackendError when there is none."""
    if torch.cuda.is_available():
        return "{}.{}".format(*torch.cuda.get_device_capability())
    if required:
        raise BackendError(
            "TensorRT builds for this machine's GPU, but there is none: use tensorrt-rtx with "
            "--target 8.9, or build on the machine that will run the engine"
        )
    return ""


def this_gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def write(folder: Path, plan: bytes, manifest: Manifest, targets: Sequence[str]) -> Path:
    """Write a plan and, last, its manifest; returns the plan's path."""
    path = folder / name_of(manifest.graph, targets)
    digest = hashlib.sha256(plan).hexdigest()
    content = {**asdict(manifest), "plan_sha256": digest}
    content["built_by"] = _signature(content)
    manifest_path = _manifest_path(path)
    # an old manifest must not vouch for a new plan
    manifest_path.unlink(missing_ok=True)
    write_whole(path, plan)
    write_whole(manifest_path, json.dumps(content, indent=1).encode())
    return path


def read(path: Path, flavour: str, version: str, *, trust: bool = False) -> tuple[Manifest, bytes]:
    """An engine's manifest and plan, every claim checked, for the current GPU.

    Raises BackendError that says what differs and what to do.
    """
    claims = check_claims(path, flavour, version, trust=trust)
    plan = path.read_bytes()
    claims.check_plan(hashlib.sha256(plan).hexdigest())
    return claims.manifest, plan


def check_claims(path: Path, flavour: str, version: str, *, trust: bool = False) -> Claims:
    """The claims of an engine's manifest, checked as by `read`, without opening the plan.

    Raises BackendError.
    """
    claims = _claims(path)
    if not trust and not hmac.compare_digest(claims.built_by, claims.signature()):
        raise BackendError(
            f"{path} was not built by you, and an engine is code for the GPU. If you trust its "
            "source, pass trust=True (--trust); otherwise build it again"
        )
    _check_place(path, claims.manifest, flavour, version)
    return claims


def check_intact(path: Path) -> None:
    """Check that a plan matches its manifest, on any machine, whoever built it.

    Raises BackendError.
    """
    _claims(path).check_plan(sha256_of(path))


def plans(folder: Path) -> list[Path]:
    """The engines of an export or bundle."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def belongs(path: Path) -> bool:
    """True for files that building engines adds: made later, for one machine."""
    return path.name == TIMING_CACHE or SUFFIX in path.suffixes


@dataclass(frozen=True)
class Claims:
    """The content of a manifest file: manifest, hash of the plan, signature of the builder."""

    path: Path
    manifest: Manifest
    plan_sha256: str
    built_by: str

    def signature(self) -> str:
        """What `built_by` is when this user built it."""
        return _signature({**asdict(self.manifest), "plan_sha256": self.plan_sha256})

    def check_plan(self, found: str) -> None:
        if found != self.plan_sha256:
            raise BackendError(f"{self.path} does not match its manifest: {_AGAIN}")


def _claims(path: Path) -> Claims:
    content = _read_manifest(path)
    digest, built_by = str(content.pop("plan_sha256", "")), str(content.pop("built_by", ""))
    try:
        return Claims(path, Manifest(**content), digest, built_by)
    except TypeError as error:
        raise BackendError(
            f"{_manifest_path(path)} is not a valid manifest ({error}): {_AGAIN}"
        ) from error


_AGAIN = "it is damaged or was changed; build it again with `dualdiff export tensorrt`"


def _check_place(path: Path, manifest: Manifest, flavour: str, version: str) -> None:
    """Raises BackendError where a manifest does not match this machine and its graph."""
    graph, here = path.parent / f"{manifest.graph}.onnx", this_gpu(required=False) or "none"
    found = sha256_of(graph) if graph.is_file() else "no such file"
    claims = {
        "format": (manifest.format, ENGINE_FORMAT),
        "flavour": (manifest.flavour, flavour),
        f"{flavour} version": (manifest.version, version),
        f"hash of {graph.name}": (manifest.graph_sha256, found),
    }
    for what, (built, have) in claims.items():
        if built != have:
            raise BackendError(
                f"{path} was built with {what} {built}, but here it is {have}: build it again with "
                "`dualdiff export tensorrt`"
            )
    if here not in manifest.targets:
        raise BackendError(
            f"{path} was built for compute capability {', '.join(manifest.targets)}, but this GPU "
            f"has {here}: build it here with `dualdiff export tensorrt`"
        )
    if manifest.gpu and manifest.gpu != this_gpu_name():
        raise BackendError(
            f"{path} was built on {manifest.gpu}, but this is {this_gpu_name()}: build it here "
            "with `dualdiff export tensorrt`"
        )


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_manifest(path: Path) -> dict[str, Any]:
    manifest = _manifest_path(path)
    for file in (path, manifest):
        if not file.is_file():
            raise BackendError(f"no {file}: build it with `dualdiff export tensorrt`")
    if manifest.stat().st_size > MOST_MANIFEST_BYTES:
        raise BackendError(f"{manifest} is not a valid manifest (over 1 MiB): {_AGAIN}")
    try:
        content = json.loads(manifest.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise BackendError(f"{manifest} cannot be read ({error}): {_AGAIN}") from error
    if not isinstance(content, dict) or content.keys() - _FIELDS:
        raise BackendError(f"{manifest} is not a valid manifest: {_AGAIN}")
    return content


_FIELDS = {field.name for field in fields(Manifest)} | {"plan_sha256", "built_by"}


def _signature(content: dict[str, Any]) -> str:
    """A keyed hash of a manifest, which names its plan by hash: only this user can make it."""
    text = json.dumps(content, sort_keys=True).encode()
    return hmac.new(_key(), text, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """This user's key, made when first needed. Raises BackendError where it cannot be kept."""
    try:
        home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        path = home / "dualdiff-engine" / "builder.key"
        if not path.is_file():
            _make_key(path)
        key = path.read_bytes()
    # without a home folder, a RuntimeError
    except (OSError, RuntimeError) as error:
        raise BackendError(
            f"the key that marks engines as built by you cannot be kept ({error}): set "
            "XDG_DATA_HOME to a folder that can be written, or pass trust=True (--trust) for "
            "engines whose source you trust"
        ) from error
    if len(key) != KEY_BYTES:
        raise BackendError(f"{path} is damaged: delete it, then build your engines again")
    return key


def _make_key(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
    try:
        # whoever comes first decides
        os.link(made, path)
    except FileExistsError:
        pass
    finally:
        made.unlink()
