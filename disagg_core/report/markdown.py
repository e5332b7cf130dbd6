"""The report of a run as markdown, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from disagg_core.report.comparison import HEAD, comparison_of
from disagg_core.report.document import RunReport
from disagg_core.report.figures import Figure, figures_of
from disagg_core.report.time_spent import HEAD as TIME_HEAD
from disagg_core.report.time_spent import time_rows


def to_markdown(report: RunReport) -> str:
    """Return the report as a person reads it: its figures, then its attempts and servers where they have a story."""
    lines = [f"# Run {report.run_id}: {report.state}", ""]
    lines += _table(("figure", "value"), ((figure.label, _weighted(figure)) for figure in figures_of(report)))
    return "\n".join([*lines, *_time_spent(report), *_comparison(report), *_attempts(report), *_servers(report)])


def _weighted(figure: Figure) -> str:
    return figure.value if figure.weight == "plain" else f"**{figure.value}**"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _row(head)
    yield "|" + "---|" * len(head)
    for row in rows:
        yield _row(row)
    yield ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")


def _time_spent(report: RunReport) -> list[str]:
    rows = time_rows(report.time_spent) if report.time_spent is not None else []
    return ["## Where time went", "", *_table(TIME_HEAD, rows)] if rows else []


def _comparison(report: RunReport) -> list[str]:
    rows = comparison_of(report)
    return ["## Drafts", "", *_table(HEAD, rows)] if rows else []


def _attempts(report: RunReport) -> list[str]:
    if len(report.attempts) < 2:
        return []
    lines = ["## Attempts", ""]
    for attempt in report.attempts:
        end = f"{attempt.failure_class}: {attempt.reason}" if attempt.failure_class else "finished"
        end = end.replace("\n", "\n   ")  # the end of a log stays in its item
        if attempt.incomplete:
            end += f"; {attempt.incomplete} lost samples are captured again"
        lines.append(f"{attempt.attempt}. {end}")
    return [*lines, ""]


def _servers(report: RunReport) -> list[str]:
    rows = [
        (server.name, str(server.captured), str(server.failures), str(server.restarts), "; ".join(server.events))
        for server in report.servers
        if server.name != "local"
    ]
    if not rows:
        return []
    head = ("server", "captured", "failures", "restarts", "what happened")
    return ["## Servers", "", *_table(head, rows)]
