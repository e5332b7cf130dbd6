"""How a command ends badly: one message and an exit code; with ``--debug`` the traceback comes first."""

from __future__ import annotations

import sys
import traceback
from typing import NoReturn

from rich.console import Console
from rich.markup import escape

from disagg_core.errors import BadInput, DraftlineError

DEBUG = "--debug"


def take_debug(arguments: list[str]) -> list[str]:
    """Return `arguments` without ``--debug``, which may stand anywhere; if it is there, show tracebacks from now on."""
    global _debug
    _debug = DEBUG in arguments
    return [argument for argument in arguments if argument != DEBUG]


def stop(error: DraftlineError, code: int | None = None) -> NoReturn:
    """Print `error` and exit with `code`; by default 2 where the input was wrong and nothing was started, else 1."""
    bad_input = isinstance(error, BadInput)
    if _debug:
        traceback.print_exception(error)
    label = "error:" if bad_input else f"failed ({error.failure_class}):"
    _print(f"[bold red]{label}[/] {escape(str(error))}")
    sys.exit(code if code is not None else 2 if bad_input else 1)


def warn(error: DraftlineError) -> None:
    """Print an `error` after which what was asked for is done all the same."""
    if _debug:
        traceback.print_exception(error)
    _print(f"[yellow]warning:[/] {escape(str(error))}")


def _print(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message)


_debug = False
