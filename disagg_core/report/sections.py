"""What a report tells beside its figures, as plain text, for all that show it: drafts, suites, attempts, servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_core.report.comparison import HEAD, comparison_of
from disagg_core.report.document import RunReport, SuiteFigures
from disagg_core.report.suites import SUITE_HEAD, suite_rows
from disagg_core.report.time_spent import HEAD as TIME_HEAD
from disagg_core.report.time_spent import time_rows

_GATE = ("suite", "prompts", "candidate", "champion", "gain")
_SERVERS = ("server", "captured", "failures", "restarts", "what happened")


@dataclass(frozen=True)
class TableSection:
    """A titled table."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables_of(report: RunReport) -> list[TableSection]:
    """Return the tables of a report that have something to say, in the order in which they are shown."""
    spent = report.time_spent
    tables = (
        TableSection("Where time went", TIME_HEAD, time_rows(spent) if spent is not None else []),
        TableSection("Drafts", HEAD, comparison_of(report)),
        *_measured(report),
        TableSection("Gate", _GATE, [_judged(suite) for suite in report.gate.suites] if report.gate else []),
        TableSection("Servers", _SERVERS, _servers(report)),
    )
    return [table for table in tables if table.rows]


def attempts_of(report: RunReport) -> list[str]:
    """Return how each attempt ended, as a text of one or more lines; none where there was but one."""
    if len(report.attempts) < 2:
        return []
    ends = []
    for attempt in report.attempts:
        end = f"{attempt.failure_class}: {attempt.reason}" if attempt.failure_class else "finished"
        if attempt.incomplete:
            end += f"; {attempt.incomplete} lost samples are captured again"
        ends.append(end)
    return ends


def _measured(report: RunReport) -> list[TableSection]:
    """Return a table of suites and categories for each draft that was measured by suite."""
    return [
        TableSection(f"Suites, {name}" if len(report.drafts) > 1 else "Suites", SUITE_HEAD, [*suite_rows(found.suites)])
        for name, found in report.evaluations.items()
    ]


def _judged(found: SuiteFigures) -> tuple[str, ...]:
    low, high = found.candidate_interval
    return (
        found.suite,
        str(found.prompts),
        f"{found.candidate:.2f} ({low:.2f} to {high:.2f})",
        "" if found.incumbent is None else f"{found.incumbent:.2f}",
        "" if found.gain is None else _gain(found.gain, found.gain_interval),
    )


def _gain(gain: float, interval: tuple[float, float] | None) -> str:
    return f"{gain:+.1%}" + (f" ({interval[0]:+.1%} to {interval[1]:+.1%})" if interval else "")


def _servers(report: RunReport) -> list[tuple[str, ...]]:
    return [
        (server.name, str(server.captured), str(server.failures), str(server.restarts), "; ".join(server.events))
        for server in report.servers
        if server.name != "local"
    ]
