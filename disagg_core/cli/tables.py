"""Tables that several commands show."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from disagg_core.report.differences import Difference

_WIDTH_IN_A_PIPE = 140


def wide_console() -> Console:
    """Return a console on standard output that does not cut lines short when it is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_WIDTH_IN_A_PIPE, soft_wrap=True)


def table_of(differences: Sequence[Difference], title: str, names: Sequence[str]) -> Table:
    """Return the differences of two things called `names`, one a line."""
    table = Table("", *names, title=title, title_justify="left")
    for difference in differences:
        table.add_row(difference.what, *(_text(value) for value in (difference.one, difference.other)))
    return table


def _text(value: object) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
