"""The published schema of report.json is that of the reports that are written."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from disagg_core.report.document import RunReport
from disagg_core.report.schema import report_schema

pytestmark = pytest.mark.unit

PUBLISHED = Path(__file__).resolve().parents[3] / "docs" / "report.schema.json"
REPORT = {
    "run_id": "night-1",
    "name": "night",
    "state": "failed",
    "failure": {"failure_class": "bad_input", "message": "no such file"},
    "accounting": None,
    "training": None,
    "evaluation": None,
    "roles": {},
    "archive": None,
    "attempts": [],
    "store_counters": {},
    "rejected_reasons": {},
    "run_dir": "/runs/night-1",
    "export": None,
    "flow_run_id": None,
    "seconds": 1.5,
}


def test_the_published_schema_is_that_of_the_reports() -> None:
    assert PUBLISHED.read_text() == report_schema(), (
        "write it anew: python -m disagg_core.report.schema docs/report.schema.json"
    )


def test_a_report_is_valid_by_it_and_something_else_is_not() -> None:
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    written = json.loads(RunReport.model_validate(REPORT).model_dump_json())
    jsonschema.validate(written, schema)
    with pytest.raises(jsonschema.ValidationError, match="'lost' is not one of"):
        jsonschema.validate({**written, "state": "lost"}, schema)
