"""The runs that this machine knows: found by their id or a prefix of it, and their plans read."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from disagg_core.errors import BadInput
from disagg_core.run.directory import RunDir
from disagg_core.run.plan import RunPlan

Document = TypeVar("Document", bound=BaseModel)


class UnknownRun(BadInput):
    """No run, or more than one, is called so; the known or matching ones are named."""


class OtherVersion(BadInput):
    """A run's document or report was written by another version of draftline; the first difference is named."""


def known_runs(runs: Path) -> list[RunDir]:
    """Return the directories of all runs below `runs` that passed their preflight, by id."""
    return sorted((RunDir(path.parent) for path in runs.glob("*/run.json")), key=lambda run: run.run_id)


def find_run(runs: Path, name: str) -> RunDir:
    """Return the directory of the run whose id is `name`, or the only one whose id begins with it.

    Raises:
        UnknownRun: there is none, or `name` is the beginning of several.
    """
    known = [run.run_id for run in known_runs(runs)]
    found = [name] if name in known else [run_id for run_id in known if name and run_id.startswith(name)]
    if not found:
        raise UnknownRun(f"no run {name!r} in {runs}; there are: {', '.join(known) or 'none'}")
    if len(found) > 1:
        raise UnknownRun(
            f"{name!r} is the beginning of {len(found)} runs in {runs}: {', '.join(found)}; give more of it"
        )
    return RunDir.of(runs, found[0])


def read_plan(run: RunDir) -> RunPlan:
    """Return the plan of a run.

    Raises:
        OtherVersion: its fields are not those of this version.
    """
    return read_document(run.document, RunPlan)


def read_document(path: Path, kind: type[Document]) -> Document:
    """Return the document of this `kind` that a run left in `path`.

    Raises:
        OtherVersion: its fields are not those of this version.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise OtherVersion(
            f"{path}: written by another version of draftline ({where}: {first['msg']}); read it with that"
        ) from error
