"""Progress is what is done, not what is published: the target's work, told to the consumer while nothing comes yet."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg_core.engines.contract import Target

QUIET_S = 900.0
"""A target may be silent for so long over what it was handed: a long prefill has nothing to show before its end."""


class WorkNotes:
    """Calls `note` when the target has done something since the last look. Pure but for the target's counts.

    `busy_since` says since when the target has been working on something without an outcome (on `clock`), None when
    it has nothing to do: that counts as work too, but not for ever.
    """

    def __init__(
        self,
        target: Target,
        note: Callable[[str], None],
        *,
        busy_since: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._note = note
        self._busy_since = busy_since
        self._clock = clock
        self._done = 0

    def look(self) -> None:
        """Note what is new."""
        done = sum(server.worked + server.captured for server in self._target.health())
        since = self._busy_since()
        if done != self._done:
            self._done = done
            self._note(f"the target works: {done} steps, batches and answers")
        elif since is not None and self._clock() - since < QUIET_S:
            self._note(f"the target has been working on a batch for {self._clock() - since:.0f} s")
