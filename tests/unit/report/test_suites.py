"""What was measured by suite, in the report and in the table for people."""

from __future__ import annotations

from typing import Any

import pytest

from disagg_core.report.document import RunReport
from disagg_core.report.markdown import to_markdown
from disagg_core.report.suites import SUITE_HEAD, suite_figures, suite_rows
from tests.unit.report.test_comparison import BOTH, draft, measured, report_of

pytestmark = pytest.mark.unit


def part(length: float, **against: Any) -> dict[str, Any]:
    """A slice as a result file has it."""
    return {
        "questions": 12,
        "accept_length": length,
        "interval": [length - 0.25, length + 0.25],
        "per_position": [0.75, 0.5],
        "tokens_per_second": 80.0,
        "tokens_per_second_interval": None,
        "against": against,
    }


def ratio(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "interval": [value - spread, value + spread]}


BESIDE = {
    "plain": {"accept_length": None, "tokens_per_second": ratio(1.5)},
    "incumbent": {"accept_length": ratio(1.05, 0.02), "tokens_per_second": ratio(1.04)},
}
SUITES = {
    "held-out": {
        "total": part(2.5, **BESIDE),
        "categories": {"all": part(2.5)},
        "prompt_lengths": {"0-127": part(2.5)},
        "positions": {},
    },
    "bench": {
        "total": part(3.0),
        "categories": {"math": part(4.0, **BESIDE), "writing": part(2.0)},
        "prompt_lengths": {"128-511": part(3.0)},
        "positions": {"0-31": part(3.5), "32-127": part(2.5)},
    },
}


def test_every_part_is_in_the_figures_and_the_table_is_short() -> None:
    figures = suite_figures(SUITES)

    assert [(found.suite, found.kind, found.part) for found in figures] == [
        ("held-out", "suite", None),
        ("held-out", "prompt_length", "0-127"),
        ("bench", "suite", None),
        ("bench", "category", "math"),
        ("bench", "category", "writing"),
        ("bench", "prompt_length", "128-511"),
        ("bench", "position", "0-31"),
        ("bench", "position", "32-127"),
    ]
    rows = list(suite_rows(figures))
    assert [row[0] for row in rows] == ["held-out", "bench", "bench: math", "bench: writing"]
    assert rows[0] == (
        "held-out",
        "12",
        "2.50 (2.25 to 2.75)",
        "+5.0% (+3.0% to +7.0%)",
        "80.0",
        "1.50 (1.40 to 1.60)",
        "0.75, 0.50",
    )
    assert rows[1][3] == rows[1][5] == "", "it was compared with nothing"
    assert len(rows[0]) == len(SUITE_HEAD)
    assert [row[0] for row in suite_rows(figures, parts=True)][-1] == "bench: tokens 32-127 of the answer"


def test_the_report_has_a_table_for_each_draft_that_was_measured_by_suite() -> None:
    found = measured(2.5).model_copy(update={"suites": suite_figures(SUITES)})
    alone = report_of(draft("eagle3", "EAGLE-3", evaluation=found))
    beside = report_of(draft("eagle3", "EAGLE-3", evaluation=found), BOTH[1])

    assert "## Suites\n" in to_markdown(alone)
    assert "| bench: math | 12 | 4.00 (3.75 to 4.25) | +5.0% (+3.0% to +7.0%) | 80.0 |" in to_markdown(alone)
    assert "prompts of 128-511 tokens" not in to_markdown(alone)
    assert "## Suites, eagle3\n" in to_markdown(beside)
    assert "## Suites, dflash\n" not in to_markdown(beside)
    assert "## Suites" not in to_markdown(report_of(*BOTH))
    assert RunReport.model_validate_json(alone.model_dump_json()) == alone
