"""How fast something goes, and how long what is left of it will take."""

from __future__ import annotations

import time
from collections.abc import Callable

from disagg_core.run.progress import ProgressValue, tells_pace


class Pace:
    """The mean rate since it was made; `begun` of the things were done by then and say nothing about it."""

    def __init__(self, begun: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._begun = begun
        self._clock = clock
        self._since = clock()

    def fields(self, done: int, total: int | None) -> dict[str, ProgressValue]:
        """Return the rate (``samples_per_s``) and the seconds left (``left_s``) for a progress file.

        Either is None where it is not known: too little was done yet (`tells_pace`), or nobody knows how much there is.
        """
        new, spent = done - self._begun, self._clock() - self._since
        if not tells_pace(new, spent):
            return {"samples_per_s": None, "left_s": None}
        rate = new / spent
        left_s = None if total is None else round(max(0, total - done) / rate)
        return {"samples_per_s": round(rate, 4), "left_s": left_s}
