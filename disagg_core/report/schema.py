"""The published JSON schema of ``report.json``: ``python -m disagg_core.report.schema docs/report.schema.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from disagg_core.files import write_atomically
from disagg_core.report.document import RunReport


def report_schema() -> str:
    """Return the JSON schema of a report as it is written, as text."""
    schema = RunReport.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=2) + "\n"


if __name__ == "__main__":
    write_atomically(Path(sys.argv[1]), report_schema())
