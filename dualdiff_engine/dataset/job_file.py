"""`job.yaml` -> `Job`: bounded, plain YAML, and errors that name the field and the remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dualdiff_engine.dataset.job import Job
from dualdiff_engine.errors import SettingsError

_MOST_BYTES = 1 << 20
_SEE = "docs/dataset.md lists the fields"


class _Loader(yaml.SafeLoader):
    """Plain YAML: no aliases, which can multiply without bound, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not used here: write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), keys)
            raise yaml.YAMLError(f"{twice} is given twice: give it once")
        return found


def load(path: str | Path, changes: Sequence[str] = ()) -> Job:
    """Read a job file; paths in it are relative to its folder.

    changes: "key=value" as of `--set`, such as "limits.batch=8" or "defects.0.pairs=10". Raises
    SettingsError.
    """
    path = Path(path)
    content = _parsed(_read(path), str(path))
    for change in changes:
        _change(content, change)
    return parse(content, str(path), path.resolve().parent)


def parse(content: Any, label: str = "job", root: Path | None = None) -> Job:
    """A job of plain values; label: names it in errors. Raises SettingsError."""
    if not isinstance(content, dict):
        raise SettingsError(f"{label}: it is not a job, which is a list of fields: {_SEE}")
    try:
        return Job.model_validate(content, context={"root": root})
    except ValidationError as error:
        raise SettingsError(f"{label}: {_line(error)}") from None
    except RecursionError:
        raise SettingsError(f"{label}: it is nested too deeply: {_SEE}") from None


def stored(job: Job) -> bytes:
    """As `job.json` holds it: `parse` reads it back."""
    return (json.dumps(job.model_dump(mode="json", exclude_unset=True), indent=2) + "\n").encode()


def _read(path: Path) -> str:
    try:
        if not path.is_file():
            raise SettingsError(f"{path}: no such job file: pass the path of a job.yaml")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise SettingsError(f"{path}: it has more than 1 MiB, a job has not: pass a job.yaml")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise SettingsError(f"{path}: it cannot be read ({error.strerror}): check it") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: it is not UTF-8 text: save it as UTF-8") from error


def _parsed(text: str, label: str) -> Any:
    try:
        # a subclass of the safe loader
        return yaml.load(text, _Loader)  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error) or "it is nested too deeply"
        what = " ".join(what.split())
        raise SettingsError(f"{label}{where}: it is not plain YAML: {what}") from None


def _change(content: Any, change: str) -> None:
    """Set one value in place. Raises SettingsError."""
    key, equals, text = change.partition("=")
    *way, last = key.strip().split(".")
    if not equals or not last:
        raise SettingsError(f"--set {change!r}: write key=value, such as limits.batch=8")
    at = content
    for step in way:
        at = _inner(at, step, change)
    value = _parsed(text, f"--set {change}")
    if isinstance(at, list):
        _inner(at, last, change)
        at[int(last)] = value
    elif isinstance(at, dict):
        at[last] = value
    else:
        raise SettingsError(f"--set {change!r}: {'.'.join(way)} has no fields: {_SEE}")


def _inner(at: Any, step: str, change: str) -> Any:
    if isinstance(at, list) and step.isdecimal() and int(step) < len(at):
        return at[int(step)]
    if isinstance(at, dict):
        return at.setdefault(step, {})
    raise SettingsError(f"--set {change!r}: there is no {step!r}; lists are counted from 0")


def _line(error: ValidationError) -> str:
    """The first fault: where, what, and the remedy."""
    found = error.errors(include_url=False)
    first = found[0]
    where = _where(first["loc"])
    kind, got = first["type"], first.get("input")
    if kind == "extra_forbidden":
        *above, name = first["loc"]
        known, where = ", ".join(_fields(above)), _where(above)
        where = f"{where}.{name}" if where else str(name)
        return f"{where}: there is no such field: choose of {known}"
    if kind == "missing":
        return f"{where}: it is missing: add it; {_SEE}"
    message = first["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {message}" if where else message
    # a field that may be one thing or another has a fault per alternative
    says = dict.fromkeys(fault["msg"] for fault in found if _where(fault["loc"]) == where)
    return f"{where}: {', or '.join(says)}, got {repr(got)[:60]}: {_SEE}"


def _where(location: Sequence[int | str]) -> str:
    """defects[0].pairs; names of alternatives, which pydantic adds, are left out."""
    text, model = "", Job
    at: Any = model
    for step in location:
        if isinstance(step, int):
            text += f"[{step}]"
        elif at is dict or step in getattr(at, "model_fields", {}):
            text += f".{step}" if text else step
            field = getattr(at, "model_fields", {}).get(step)
            is_dict = field is not None and getattr(field.annotation, "__origin__", None) is dict
            at = dict if is_dict else _model_of(at, step)
    return text


def _model_of(model: Any, name: str) -> Any:
    """The model of a field, whatever stands around it; None where it holds plain values."""
    field = getattr(model, "model_fields", {}).get(name)
    return None if field is None else _first_model(field.annotation)


def _first_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner = (_first_model(each) for each in getattr(annotation, "__args__", ()))
    return next((each for each in inner if each is not None), None)


def _fields(location: Sequence[int | str]) -> list[str]:
    model: Any = Job
    for step in location:
        model = _model_of(model, step) if isinstance(step, str) else model
    return list(getattr(model, "model_fields", {}))
