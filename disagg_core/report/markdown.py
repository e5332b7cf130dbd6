"""The report of a run as markdown, for people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from disagg_core.report.document import RunReport
from disagg_core.report.figures import Figure, figures_of
from disagg_core.report.sections import attempts_of, tables_of


def to_markdown(report: RunReport) -> str:
    """Return the report as a person reads it: its figures, then its tables and attempts where they have a story."""
    lines = [f"# Run {report.run_id}: {report.state}", ""]
    lines += _table(("figure", "value"), ((figure.label, _weighted(figure)) for figure in figures_of(report)))
    for table in tables_of(report):
        lines += [f"## {table.title}", "", *_table(table.head, table.rows)]
    return "\n".join([*lines, *_attempts(report)])


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


def _attempts(report: RunReport) -> list[str]:
    ends = attempts_of(report)
    if not ends:
        return []
    # The end of a log stays in its item.
    items = (f"{number}. {end}".replace("\n", "\n   ") for number, end in enumerate(ends, 1))
    return ["## Attempts", "", *items, ""]
