"""Findings of a check, gathered: whoever mends one thing shall not have to start over to hear of the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from disagg_core.errors import BadInput, DraftlineError

T = TypeVar("T")


class NotReady(BadInput):
    """Several things keep a run from starting; all of them are in the message."""


class Findings:
    """What keeps a run from starting, in the order in which it was found."""

    def __init__(self) -> None:
        self._errors: list[DraftlineError] = []

    def of(self, check: Callable[[], T]) -> T | None:
        """Return what `check` returns, or None if it raised one of our errors, which is kept."""
        try:
            return check()
        except DraftlineError as error:
            self._errors.append(error)
            return None

    def raise_all(self) -> None:
        """Raise what was found: a single error as it is, several as one.

        Raises:
            DraftlineError: the only finding.
            NotReady: there are several.
        """
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        listed = "".join(f"\n{number}. {error}" for number, error in enumerate(self._errors, 1))
        raise NotReady(f"{len(self._errors)} things keep this run from starting:{listed}")
