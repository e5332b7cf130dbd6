"""The circuit breaker of each server: a server that fails again and again gets no work until it has proved itself.

Pure state machine, clock injected. ``closed``: works. ``open``: failed `threshold` times in a row; no work for
`probation_s`, doubled with each relapse up to sixteen times that. ``probation``: one request at a time; the first
success closes the circuit, a failure opens it again.

A server that says it is busy has not failed. It is paused, for longer each time in a row, and then gets half as many
requests at a time; each success gives it back a part of one, as TCP's congestion control does (RFC 5681).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

CircuitState = Literal["closed", "open", "probation"]

_LONGEST_PROBATION = 16
_EVENTS_KEPT = 50
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 8.0


@dataclass
class _Circuit:
    state: CircuitState = "closed"
    failures_in_row: int = 0
    relapses: int = 0
    open_until: float = 0.0
    in_flight: int = 0
    room: float = math.inf
    paused_until: float = 0.0
    pause_s: float = 0.0
    failures: int = 0
    last_reason: str = ""
    events: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class CircuitReport:
    """What became of one server: its present state, counts, and what happened when, in words."""

    name: str
    state: CircuitState
    in_flight: int
    failures: int
    last_reason: str
    events: tuple[str, ...]


class CircuitBreakers:
    """Chooses a server for each request. Not safe across threads: the caller holds a lock."""

    def __init__(
        self,
        servers: Iterable[str],
        *,
        concurrency: int,
        threshold: int = 3,
        probation_s: float = 5.0,
        clock: Callable[[], float],
    ) -> None:
        self._circuits = {name: _Circuit() for name in servers}
        if not self._circuits:
            raise ValueError("expected at least one server, found none")
        self._concurrency = concurrency
        self._threshold = threshold
        self._probation_s = probation_s
        self._clock = clock

    def acquire(self, avoid: Collection[str] = ()) -> str | None:
        """Return the least busy usable server and count the request on it; None if none has a free place.

        A server in `avoid` is chosen only when no other usable server exists at all, busy ones included: a prompt
        that failed on one server waits for another rather than go back.
        """
        usable = [name for name in self._circuits if self._usable(name)]
        preferred = [name for name in usable if name not in avoid] or usable
        free = [name for name in preferred if self._circuits[name].in_flight < self._places(name)]
        if not free:
            return None
        chosen = min(free, key=lambda name: self._circuits[name].in_flight)
        self._circuits[chosen].in_flight += 1
        return chosen

    @property
    def any_usable(self) -> bool:
        """Whether a server is closed or on probation; False means that the target is unavailable at present."""
        return any(self._usable(name) for name in self._circuits)

    def succeeded(self, name: str) -> None:
        """End a request that the server answered, also with a complaint about the prompt."""
        circuit = self._circuits[name]
        circuit.in_flight -= 1
        circuit.failures_in_row = 0
        circuit.pause_s = 0.0
        circuit.room += 1 / circuit.room
        if circuit.state != "closed" and not math.isinf(circuit.open_until):
            circuit.state = "closed"
            circuit.relapses = 0
            self._note(circuit, "works again")

    def busy(self, name: str, reason: str) -> None:
        """End a request that the server had no room for. Those that were under way with it say nothing new."""
        circuit = self._circuits[name]
        now = self._clock()
        if now >= circuit.paused_until:
            circuit.room = max(1.0, min(circuit.room, circuit.in_flight) / 2)
            circuit.pause_s = min(max(_FIRST_PAUSE_S, 2 * circuit.pause_s), _LONGEST_PAUSE_S)
            circuit.paused_until = now + circuit.pause_s
            self._note(circuit, f"paused for {circuit.pause_s:g} s: {reason}")
        circuit.in_flight -= 1

    def failed(self, name: str, reason: str) -> None:
        """End a request that the server did not answer: refused, broken off, or timed out."""
        circuit = self._circuits[name]
        circuit.in_flight -= 1
        circuit.failures += 1
        circuit.failures_in_row += 1
        if not math.isinf(circuit.open_until):
            circuit.last_reason = reason
        if circuit.state == "probation" or (circuit.state == "closed" and circuit.failures_in_row >= self._threshold):
            self._open(circuit, reason)

    def take_away(self, name: str, reason: str) -> None:
        """Give `name` no work until `give_back`: it is known to be gone, and time alone will not bring it back."""
        circuit = self._circuits[name]
        circuit.state = "open"
        circuit.open_until = math.inf
        circuit.last_reason = reason
        self._note(circuit, reason.splitlines()[0])

    def give_back(self, name: str, event: str) -> None:
        """Let `name`, which was taken away, prove itself again: it is on probation from now on."""
        circuit = self._circuits[name]
        circuit.open_until = self._clock()
        self._note(circuit, event)

    def reports(self) -> list[CircuitReport]:
        """Return what became of every server."""
        for name in self._circuits:
            self._usable(name)
        return [
            CircuitReport(
                name=name,
                state=circuit.state,
                in_flight=circuit.in_flight,
                failures=circuit.failures,
                last_reason=circuit.last_reason,
                events=tuple(circuit.events),
            )
            for name, circuit in self._circuits.items()
        ]

    def _usable(self, name: str) -> bool:
        circuit = self._circuits[name]
        if circuit.state == "open" and self._clock() >= circuit.open_until:
            circuit.state = "probation"
        return circuit.state != "open"

    def _places(self, name: str) -> int:
        circuit = self._circuits[name]
        if self._clock() < circuit.paused_until:
            return 0
        return int(min(circuit.room, self._concurrency)) if circuit.state == "closed" else 1

    def _open(self, circuit: _Circuit, reason: str) -> None:
        pause = self._probation_s * min(2**circuit.relapses, _LONGEST_PROBATION)
        circuit.state = "open"
        circuit.relapses += 1
        circuit.open_until = self._clock() + pause
        self._note(circuit, f"taken out for {pause:g} s: {reason}")

    def _note(self, circuit: _Circuit, event: str) -> None:
        circuit.events.append(event)
        del circuit.events[:-_EVENTS_KEPT]
