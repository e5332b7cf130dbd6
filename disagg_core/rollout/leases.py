"""Who works on which prompt: the state machine that neither loses nor doubles one.

Every ordinal of the run's order is in exactly one state::

    unseen ──take──> leased ──complete──> done
                       │ ├────reject────> rejected
                       │ └────fail (attempts used up)──> rejected (quarantined)
                       ├─fail, expire, give back──> waiting ──take──> leased ...
    skipped                 (an earlier attempt's checkpoint, or this attempt's stream, has it already)

Pure: no thread, no clock of its own, no I/O. A lease carries a number; an answer under a lease that has expired or was
given back is stale and changes nothing, so a worker that comes back from the dead cannot answer for a prompt that
somebody else holds by now.

A prompt that has failed is a *suspect*: it may be what killed its server. Suspects go out alone at first; each that
comes to something shows that the trouble was not theirs, and twice as many may go out together, up to
`MOST_SUSPECTS`. A failure among them begins anew. One with a single attempt left always goes alone, so that a poisonous
prompt uses up its own attempts and not the last ones of its neighbours.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from disagg_core.ordinals import OrdinalSet

MOST_SUSPECTS = 16
"""Prompts that have failed and are tried again together, at most."""


@dataclass(frozen=True)
class Lease:
    """The right to answer for one ordinal until `deadline` (in the clock's seconds).

    `failures` counts the attempts that failed before; `avoid` names the servers on which they failed.
    """

    ordinal: int
    number: int
    worker: str
    deadline: float
    failures: int
    avoid: frozenset[str]


@dataclass
class _Trouble:
    failures: int = 0
    avoid: set[str] = field(default_factory=set)
    reason: str = ""


class LeaseBook:
    """Leases over the ordinals ``[0, end)``, lowest first, those that failed before the unseen ones."""

    def __init__(
        self,
        *,
        end: int | None,
        skip: OrdinalSet | None = None,
        max_attempts: int,
        lease_s: float,
        clock: Callable[[], float],
    ) -> None:
        if max_attempts < 1:
            raise ValueError(f"expected max_attempts of at least 1, found {max_attempts}")
        self._end = end
        self._next = 0
        self._skip = OrdinalSet(skip.ranges()) if skip is not None else OrdinalSet()
        self._max_attempts = max_attempts
        self._lease_s = lease_s
        self._clock = clock
        self._leased: dict[int, Lease] = {}
        self._waiting: list[int] = []
        self._trouble: dict[int, _Trouble] = {}
        self._numbers = 0
        self._suspects = 1
        self.done = OrdinalSet()
        self.rejected = OrdinalSet()

    # --- taking ----------------------------------------------------------------------------------------------------

    @property
    def next_unseen(self) -> int | None:
        """The lowest ordinal that was never leased, skipped or rejected; None at the end of the order."""
        while self._next in self._skip:
            self._next += 1
        return None if self._end is not None and self._next >= self._end else self._next

    def upcoming(self, count: int) -> list[int]:
        """Return the next `count` ordinals that were never leased, skipped or rejected."""
        found: list[int] = []
        ordinal = self.next_unseen
        while ordinal is not None and len(found) < count and (self._end is None or ordinal < self._end):
            if ordinal not in self._skip:
                found.append(ordinal)
            ordinal += 1
        return found

    def set_end(self, end: int) -> None:
        """Say where the order ends, once a stream of unknown length has shown it."""
        if self._end is not None and end != self._end:
            raise ValueError(f"the order ends at {self._end}, not at {end}")
        self._end = end

    def take_unseen(self, worker: str, stop: int) -> list[Lease]:
        """Lease all unseen ordinals below `stop`."""
        leases = []
        while (ordinal := self.next_unseen) is not None and ordinal < stop:
            self._next = ordinal + 1
            leases.append(self._lease(ordinal, worker))
        return leases

    def take_waiting(self, worker: str) -> Lease | None:
        """Lease the lowest ordinal that came back, if there is one that may go out now."""
        out = [lease.failures for lease in self._leased.values() if lease.failures]
        alone_out = any(failures >= self._last_chance for failures in out)
        passed_over = []
        taken = None
        while self._waiting and taken is None:
            ordinal = heapq.heappop(self._waiting)
            trouble = self._trouble.get(ordinal)
            allowed = self._suspects if trouble and trouble.failures < self._last_chance else 1
            if trouble is not None and (alone_out or len(out) >= allowed):
                passed_over.append(ordinal)
            else:
                taken = self._lease(ordinal, worker)
        for ordinal in passed_over:
            heapq.heappush(self._waiting, ordinal)
        return taken

    @property
    def _last_chance(self) -> int:
        """Failures after which a prompt has one attempt left."""
        return self._max_attempts - 1

    def _lease(self, ordinal: int, worker: str) -> Lease:
        self._numbers += 1
        trouble = self._trouble.get(ordinal, _Trouble())
        lease = Lease(
            ordinal=ordinal,
            number=self._numbers,
            worker=worker,
            deadline=self._clock() + self._lease_s,
            failures=trouble.failures,
            avoid=frozenset(trouble.avoid),
        )
        self._leased[ordinal] = lease
        return lease

    # --- answers ---------------------------------------------------------------------------------------------------

    def holds(self, lease: Lease) -> bool:
        """Tell whether `lease` is in force."""
        held = self._leased.get(lease.ordinal)
        return held is not None and held.number == lease.number

    def complete(self, lease: Lease) -> bool:
        """Mark the ordinal as done; False if the lease is stale and the answer must be thrown away."""
        if not self.holds(lease):
            return False
        del self._leased[lease.ordinal]
        if self._trouble.pop(lease.ordinal, None) is not None:
            self._suspects = min(2 * self._suspects, MOST_SUSPECTS)
        return self.done.add(lease.ordinal)

    def reject(self, lease: Lease) -> bool:
        """Take the ordinal out for good, as unusable; False if the lease is stale."""
        if not self.holds(lease):
            return False
        del self._leased[lease.ordinal]
        self._trouble.pop(lease.ordinal, None)
        return self.rejected.add(lease.ordinal)

    def fail(self, lease: Lease, reason: str, server: str) -> bool:
        """Count a failed attempt on `server`; True if it was the last one and the ordinal is now rejected."""
        if not self.holds(lease):
            return False
        trouble = self._trouble.setdefault(lease.ordinal, _Trouble())
        trouble.failures += 1
        trouble.avoid.add(server)
        trouble.reason = reason
        self._suspects = 1
        if trouble.failures >= self._max_attempts:
            return self.reject(lease)
        self.give_back(lease)
        return False

    def give_back(self, lease: Lease) -> bool:
        """Return an ordinal that was not attempted; False if the lease is stale."""
        if not self.holds(lease):
            return False
        del self._leased[lease.ordinal]
        heapq.heappush(self._waiting, lease.ordinal)
        return True

    def expire(self) -> list[tuple[Lease, bool]]:
        """Fail the leases whose deadline has passed; return each with whether its ordinal is now rejected."""
        now = self._clock()
        late = [lease for lease in self._leased.values() if lease.deadline <= now]
        return [(lease, self.fail(lease, f"no answer from {lease.worker}", lease.worker)) for lease in late]

    def skip_done(self, ordinals: Iterable[int]) -> None:
        """Leave out unseen ordinals: their samples are in the stream already. Before the first lease only."""
        assert not self._numbers, "leases were taken already"
        for ordinal in ordinals:
            self._skip.add(ordinal)

    def skip_rejected(self, ordinals: Iterable[int]) -> None:
        """Count unseen ordinals as rejected before the start: an earlier process of this attempt rejected them."""
        for ordinal in ordinals:
            if ordinal not in self._skip:
                self._skip.add(ordinal)
                self.rejected.add(ordinal)

    # --- counts ----------------------------------------------------------------------------------------------------

    @property
    def leased(self) -> int:
        """Ordinals that somebody holds."""
        return len(self._leased)

    @property
    def waiting(self) -> int:
        """Ordinals that came back and wait to be leased again."""
        return len(self._waiting)

    @property
    def drained(self) -> bool:
        """Whether nothing is pending and nothing is leased: the only meaning of being finished."""
        return not self._leased and not self._waiting and self.next_unseen is None
