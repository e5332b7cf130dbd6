"""Reading a run document from YAML, with overrides, into a `RunSpec` whose paths are absolute.

Relative paths mean relative to the document, so that it works from any directory and on any worker. A model that may
also be a Hugging Face id is a directory if there is one of that name beside the document, or where the caller is.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from disagg_core.errors import SpecError
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.draft import DEFAULT_METHOD, draft_sections
from disagg_core.run_spec.section import is_local

_PATHS = (
    ("target", "model"),
    ("target", "config"),
    ("data", "prompts"),
    ("data", "holdout"),
    ("data", "chat_template"),
    ("archive", "url"),
    ("registry", "url"),
)
_MAY_BE_HUB_IDS = {("target", "model"), ("target", "config")}


def load_spec(path: Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Read the run document at `path`, apply ``section.key=value`` overrides, and validate it.

    Raises:
        SpecError: no such file, no YAML mapping, an unknown or ill-typed key, or an override of another form.
    """
    spec = parse_spec(with_overrides(_read_yaml(path), overrides), source=str(path))
    return _with_absolute_paths(spec, path.resolve().parent)


def with_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `document`, changed by ``section.key=value`` overrides.

    Raises:
        SpecError: an override of another form.
    """
    for override in overrides:
        _apply_override(document, override)
    return document


def parse_spec(document: dict[str, Any], *, source: str = "spec") -> RunSpec:
    """Validate a run document.

    Raises:
        SpecError: names every key that is wrong, what stands there, and what is allowed.
    """
    try:
        return RunSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError("\n".join([f"{source}: the run document is not valid:", *_explain(error)])) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such run document; examples are in infra/runs/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise SpecError(f"{path}: expected sections (run, target, data, ...), found {type(document).__name__}")
    return document


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    names = key.strip().split(".")
    if not separator or len(names) < 2 or not all(names):
        raise SpecError(f"--set: expected section.key=value, found {override!r}")
    node: Any = document
    for name in names[:-1]:
        node = _named(node, name, override) if isinstance(node, list) else _entered(node, name)
        if not isinstance(node, (dict, list)):
            raise SpecError(f"--set {override}: {name} is a value, not a section")
    if isinstance(node, list):
        raise SpecError(f"--set {override}: expected {'.'.join(names[:-1])}.<name>.key=value, found a list there")
    try:
        node[names[-1]] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"--set {override}: {text!r} is not a YAML value") from None


def _entered(node: dict[str, Any], name: str) -> Any:
    """Return the section `name` of `node`, a new one if there is none."""
    if node.get(name) is None:
        node[name] = {}
    return node[name]


def _named(nodes: list[Any], name: str, override: str) -> Any:
    """Return the draft called `name` among those of a list."""
    names = {node.get("name") or node.get("method", DEFAULT_METHOD): node for node in nodes if isinstance(node, dict)}
    if name not in names:
        raise SpecError(f"--set {override}: expected one of {', '.join(names)}, found {name}")
    return names[name]


def _explain(error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        where = ".".join(_keys(problem["loc"])) or "document"
        if problem["type"] == "extra_forbidden":
            allowed = sorted(_fields_at(problem["loc"][:-1]))
            name = str(problem["loc"][-1])
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            lines.append(f"  {where}: unknown key; {hint}allowed here: {', '.join(allowed)}")
        elif problem["type"] == "missing":
            lines.append(f"  {where}: missing")
        else:
            lines.append(f"  {where}: {_message(problem)}")
    return lines


def _message(problem: ErrorDetails) -> str:
    message = problem["msg"].removeprefix("Value error, ")
    return message if "found" in message else f"{message}, found {problem['input']!r}"


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return `location` as keys of the document: pydantic adds the method that told the kinds of draft apart."""
    keys = [str(part) for part in location]
    place = _draft_at(keys)
    return keys[:place] + keys[place + 1 :] if set(keys[place : place + 1]) & draft_sections().keys() else keys


def _draft_at(keys: list[str]) -> int:
    """Return the place in `keys` after those that name a draft; beyond the end if they name none."""
    return {"draft": 1, "drafts": 2}.get(keys[0], len(keys)) if keys else 0


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = RunSpec
    keys = [str(part) for part in location]
    place = _draft_at(keys)
    if place < len(keys) and keys[place] in draft_sections():
        model, location = draft_sections()[keys[place]], location[place + 1 :]
    for name in location:
        annotation = model.model_fields[str(name)].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def _with_absolute_paths(spec: RunSpec, base: Path) -> RunSpec:
    document = spec.model_dump(mode="json")
    for section, key in _PATHS:
        document[section][key] = _absolute(
            document[section][key], base, may_be_hub_id=(section, key) in _MAY_BE_HUB_IDS
        )
    for draft in [document["draft"]] if document["draft"] is not None else document["drafts"]:
        named = draft["init_from"] is not None and not (base / draft["init_from"]).is_dir()
        draft["init_from"] = _absolute(draft["init_from"], base, may_be_hub_id=named)
    suites = document["evaluation"]["suites"]
    document["evaluation"]["suites"] = {
        name: _absolute(file, base, may_be_hub_id=False) for name, file in suites.items()
    }
    return RunSpec.model_validate(document)


def _absolute(value: str | None, base: Path, *, may_be_hub_id: bool) -> str | None:
    if value is None or "://" in value:
        return value
    if may_be_hub_id and not (base / value).is_dir():
        if not is_local(value):
            return value
        beside_caller = not value.startswith((".", "/", "~"))
        base = Path.cwd() if beside_caller else base
    prefix = ""
    if value.startswith("hf:"):
        if not is_local(value.removeprefix("hf:")):
            return value
        prefix, value = "hf:", value.removeprefix("hf:")
    return prefix + str((base / Path(value).expanduser()).resolve())
