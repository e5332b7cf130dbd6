"""Records that cannot be used, counted by reason, and the share of them that a run puts up with."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from disagg_core.errors import PromptError
from disagg_core.run_spec.data import DataSection

_SHOWN_REASONS = 5
_SHOWN_PLACES = 5
_PARTICULAR = re.compile(r"'[^']*'|\"[^\"]*\"|\\u[0-9a-f]{4}|0x[0-9a-f]{2}|\d+")


class BadRecord(PromptError):
    """One record that cannot be used: where it stands (`source`), and the `reason`."""

    def __init__(self, source: str, reason: str) -> None:
        name, _, place = source.rpartition(":")
        super().__init__(f"{name}, line {place}: {reason}" if place.isdecimal() else f"{name}, {place}: {reason}")
        self.source = source
        self.reason = reason


def kind_of_reason(reason: str) -> str:
    """Return `reason` without what differs from record to record: numbers and quoted words."""
    return _PARTICULAR.sub("…", reason)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """Return how often each kind of reason was given; a kind given in one wording only has that as its name."""
    kinds: dict[str, Counter[str]] = {}
    for reason in reasons:
        kinds.setdefault(kind_of_reason(reason), Counter())[reason] += 1
    return {kind if len(wordings) > 1 else next(iter(wordings)): wordings.total() for kind, wordings in kinds.items()}


@dataclass
class Reason:
    """One reason for which records are refused: how many, the first one's own words, and where the first ones stand."""

    example: str
    count: int = 0
    places: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return one line for people."""
        more = ", …" if self.count > len(self.places) else ""
        return f"{self.count} x {self.example} ({', '.join(self.places)}{more})"


class Refusals:
    """Counts what is refused, by kind of reason. Safe from several threads."""

    def __init__(self) -> None:
        self.count = 0
        self.reasons: dict[str, Reason] = {}
        self._lock = threading.Lock()

    def add(self, source: str, reason: str) -> None:
        """Count one record at `source`."""
        place = source.rpartition(":")[2]
        with self._lock:
            self.count += 1
            known = self.reasons.setdefault(kind_of_reason(reason), Reason(reason))
            known.count += 1
            if len(known.places) < _SHOWN_PLACES:
                known.places.append(f"line {place}" if place.isdecimal() else place)

    def describe(self) -> str:
        """Return the commonest reasons in one line."""
        often = sorted(self.reasons.values(), key=lambda reason: -reason.count)
        more = f"; and {len(often) - _SHOWN_REASONS} other reasons" if len(often) > _SHOWN_REASONS else ""
        return "; ".join(reason.describe() for reason in often[:_SHOWN_REASONS]) + more


class BadRecords(Refusals):
    """The records of one source that cannot be used, held against what the run document allows."""

    def __init__(self, data: DataSection, source: str) -> None:
        super().__init__()
        self._data = data
        self._source = source

    def take(self, error: BadRecord) -> None:
        """Count one.

        Raises:
            BadRecord: none is allowed.
        """
        if self._data.on_bad_record == "fail":
            raise error
        self.add(error.source, error.reason)

    def check(self, records: int) -> None:
        """Judge what was counted among `records`.

        Raises:
            PromptError: it is more than ``data.max_bad_records`` allows, or all.
        """
        if self.count and (self.count > records * self._data.max_bad_records or self.count == records):
            allowed = f"data.max_bad_records allows {self._data.max_bad_records:.1%}"
            raise PromptError(
                f"{self._source}: {self.count} of {records} records cannot be used, {allowed}: {self.describe()}"
            )
