"""Two runs side by side: in what they differed (document, data, identity, versions), and what came of it.

Read from an archive or from a run's directory, as plain JSON: a run of another version of draftline can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from disagg_core.errors import BadInput
from disagg_core.report.differences import Difference, compare
from disagg_core.storage.place import Place

_POINTS = 10
"""Points of a curve that are shown."""
_CURVES = ("loss", "simulated_accept_length")
_IDENTITY = ("target", "capture", "tokenizer_version", "draft_vocab_size", "warm_starts")
_RESULTS = ("state", "accounting", "training", "evaluation", "gate", "rejected_reasons", "quarantined_reasons")


class CurvePoint(BaseModel):
    """A figure of both runs at one optimizer step; None where a run has none."""

    model_config = ConfigDict(frozen=True)

    figure: str
    step: int
    one: float | None
    other: float | None


class RunComparison(BaseModel):
    """In what two runs differed, by kind, and their curves at the same steps."""

    model_config = ConfigDict(frozen=True)

    document: list[Difference]
    data: list[Difference]
    identity: list[Difference]
    versions: list[Difference]
    results: list[Difference]
    curves: list[CurvePoint]


def compare_runs(one: Place, other: Place) -> RunComparison:
    """Compare the runs whose files are at `one` and `other`.

    Raises:
        BadInput: there is no run.
    """
    plans = [_document(place, "run.json") for place in (one, other)]
    if not all(plans):
        missing = one if not plans[0] else other
        raise BadInput(f"{missing.url}: expected a run's directory or archive with run.json, found none")
    reports = [_document(place, "report.json") for place in (one, other)]
    return RunComparison(
        document=compare(*({"spec": plan.get("spec")} for plan in plans)),
        data=compare(*({"data": plan.get("data")} for plan in plans)),
        identity=compare(*({key: plan.get(key) for key in _IDENTITY} for plan in plans)),
        versions=compare(*(_document(place, "environment.json") for place in (one, other))),
        results=compare(*({key: report.get(key) for key in _RESULTS} for report in reports)),
        curves=_curves(_steps(one), _steps(other)),
    )


def _document(place: Place, name: str) -> dict[str, JsonValue]:
    """Return a document of a run; empty if the run has none."""
    try:
        found = json.loads(place.read(name))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadInput(f"{place.url}: {name} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _steps(place: Place) -> dict[int, Mapping[str, Any]]:
    """Return what was measured at each optimizer step; the last word of a step that was repeated."""
    try:
        lines = place.read("metrics/train.jsonl").splitlines()
    except FileNotFoundError:
        return {}
    found: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found[record["step"]] = record
    return found


def _curves(one: dict[int, Mapping[str, Any]], other: dict[int, Mapping[str, Any]]) -> list[CurvePoint]:
    steps = sorted(one.keys() | other.keys())
    shown = (
        steps
        if len(steps) <= _POINTS
        else [steps[round(at * (len(steps) - 1) / (_POINTS - 1))] for at in range(_POINTS)]
    )
    return [
        CurvePoint(figure=figure, step=step, one=_value(one, step, figure), other=_value(other, step, figure))
        for figure in _CURVES
        for step in shown
        if _value(one, step, figure) is not None or _value(other, step, figure) is not None
    ]


def _value(records: dict[int, Mapping[str, Any]], step: int, figure: str) -> float | None:
    value = records.get(step, {}).get(figure)
    return float(value) if isinstance(value, (int, float)) else None
