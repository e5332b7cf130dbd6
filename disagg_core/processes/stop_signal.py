"""SIGTERM and SIGINT as an orderly end of a role: remembered, passed on once there is somebody to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from disagg_core.errors import Preempted


class StopSignal:
    """Remembers that the process was asked to stop and passes it on; a second signal changes nothing.

    Plain fields: a handler that takes a lock, as an event's does, may wait for the very thread that it interrupts.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._asked = ""
        self._stop: Callable[[str], None] | None = None

    def install(self) -> None:
        """Handle the signals from now on. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._asked = f"the {self._role} was asked to stop ({signal.Signals(number).name})"
        if self._stop is not None:
            self._stop(self._asked)

    def forward_to(self, stop: Callable[[str], None]) -> None:
        """Call `stop` with the reason when asked; at once if that was before."""
        self._stop = stop
        if self._asked:
            stop(self._asked)

    def check(self) -> None:
        """Raise `Preempted` if the process was asked to stop: for the time before there is anything to stop."""
        if self._asked:
            raise Preempted(self._asked)

    def wait(self, seconds: float) -> None:
        """Wait for `seconds`; raise `Preempted` if the process was asked to stop."""
        time.sleep(seconds)
        self.check()
