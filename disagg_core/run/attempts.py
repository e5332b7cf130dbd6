"""The attempts of a run: what an attempt's end means for the next one. Pure; the clock is passed in.

What follows a failure of each class stands in `disagg_core.failures.POLICIES`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from disagg_core.errors import FailureClass, RoleFailed
from disagg_core.failures import POLICIES

RETRIED: frozenset[FailureClass] = frozenset(name for name, policy in POLICIES.items() if policy.retried)
"""Classes of failure after which another attempt makes sense."""


@dataclass(frozen=True)
class AttemptOutcome:
    """How one attempt ended: finished, or the class and reason of the first failure."""

    attempt: int
    failure_class: FailureClass | None = None
    reason: str = ""
    incomplete: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run is done: no failure, and no sample left that has to be captured again."""
        return self.failure_class is None and self.incomplete == 0

    def describe(self) -> str:
        """Return how it ended in one line."""
        if self.failure_class is not None:
            return f"{self.failure_class}: {self.reason}"
        return f"{self.incomplete} samples were lost and have to be captured again" if self.incomplete else "finished"


@dataclass
class AttemptLoop:
    """Decides after each attempt whether there is a next one, and when; remembers all ends for the report.

    `first` is the number of the first attempt: higher than 1 where an earlier process ran some already. `clock` gives
    seconds: failures of one outage use up one attempt of `limit`.
    """

    limit: int
    first: int = 1
    outcomes: list[AttemptOutcome] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic
    _ended_at: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the attempts to run, each to be recorded before the next, until the run is finished."""
        while (attempt := self.next()) is not None:
            yield attempt

    def next(self) -> int | None:
        """Return the number of the attempt to run next, `pause_s` seconds from now, or None when the run is finished.

        Raises:
            RoleFailed: the last failure is of a class that is not retried (any more), or the attempts are used up.
        """
        if not self.outcomes:
            return self.first
        last = self.outcomes[-1]
        if last.finished:
            return None
        failure_class = last.failure_class or "store_lost"
        policy = POLICIES[failure_class]
        told = f"attempt {last.attempt} failed, {last.describe()}"
        if policy.retries is not None and self._failures_of(failure_class) > policy.retries:
            again = f"was tried again {policy.retries} time(s)" if policy.retried else "is never tried again"
            raise RoleFailed(f"{told}; {failure_class} {again}. {policy.way_out}", failure_class)
        if self.used_up >= self.limit:
            raise RoleFailed(f"{told}; run.attempts allows {self.limit}. {policy.way_out}", failure_class)
        return last.attempt + 1

    def record(self, outcome: AttemptOutcome) -> None:
        """Remember how an attempt ended, now."""
        self.outcomes.append(outcome)
        self._ended_at.append(self.clock())

    @property
    def pause_s(self) -> float:
        """Seconds to wait before the next attempt; they grow with each failure of the same class in a row."""
        last = self.outcomes[-1].failure_class if self.outcomes else None
        if last is None:
            return 0.0
        in_a_row = 0
        for outcome in reversed(self.outcomes):
            if outcome.failure_class != last:
                break
            in_a_row += 1
        return POLICIES[last].pause_after(in_a_row)

    @property
    def used_up(self) -> int:
        """Attempts that count against the limit: those of one outage count as one."""
        count = 0
        outage_began: float | None = None
        for outcome, ended_at in zip(self.outcomes, self._ended_at, strict=True):
            outage_s = POLICIES[outcome.failure_class].outage_s if outcome.failure_class is not None else 0.0
            if outage_began is None or ended_at - outage_began >= outage_s:
                count += 1
                outage_began = ended_at if outage_s else None
        return count

    def _failures_of(self, failure_class: FailureClass) -> int:
        return sum(outcome.failure_class == failure_class for outcome in self.outcomes)
