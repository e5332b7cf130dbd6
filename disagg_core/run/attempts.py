"""The attempts of a run: what an attempt's end means for the next one. Pure, without Prefect and without I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from disagg_core.errors import FailureClass, RoleFailed

RETRIED: frozenset[FailureClass] = frozenset(
    {"out_of_memory", "store_lost", "target_unavailable", "stalled", "preempted"}
)
"""Classes of failure after which another attempt makes sense. Bad input and bugs would only fail again."""


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
    """Decides after each attempt whether there is a next one; remembers all ends for the report.

    `first` is the number of the first attempt: higher than 1 where an earlier process ran some already.
    """

    limit: int
    first: int = 1
    outcomes: list[AttemptOutcome] = field(default_factory=list)

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers of the attempts to run, each to be recorded before the next, until the run is finished."""
        while (attempt := self.next()) is not None:
            yield attempt

    def next(self) -> int | None:
        """Return the number of the attempt to run now, or None when the run is finished.

        Raises:
            RoleFailed: the last failure is of a class that is not retried, or the attempts are used up.
        """
        if not self.outcomes:
            return self.first
        last = self.outcomes[-1]
        if last.finished:
            return None
        failure_class = last.failure_class or "store_lost"
        if failure_class not in RETRIED:
            raise RoleFailed(f"attempt {last.attempt} failed, {last.describe()}", failure_class)
        if len(self.outcomes) >= self.limit:
            raise RoleFailed(
                f"attempt {last.attempt} failed, {last.describe()}; run.attempts allows {self.limit}", failure_class
            )
        return last.attempt + 1

    def record(self, outcome: AttemptOutcome) -> None:
        """Remember how an attempt ended."""
        self.outcomes.append(outcome)
