"""Flow control: the pure state machine that decides whether the producer may publish.

Publishing pauses when what is in flight (published, not acknowledged) reaches a high watermark, in references or in
bytes, and goes on when both are at or below their low watermarks. Why no setting accepted here can deadlock: the
consumer moves as soon as a whole optimizer window is in flight, and the producer is paused only while more than a low
watermark is. With both low watermarks at least a window, a paused producer always leaves the consumer a whole window.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_core.run.watermarks import Watermarks


@dataclass
class FlowControl:
    """Whether the producer may publish, given what is in flight. Holds no other state than the hysteresis."""

    marks: Watermarks
    clock: Callable[[], float] = time.monotonic
    paused: bool = False
    pauses: int = 0
    _paused_since: float = 0.0
    _paused_before: float = field(default=0.0)

    def may_publish(self, in_flight_refs: int, in_flight_bytes: int = 0) -> bool:
        """Return whether another batch may be published while so much is in flight.

        Negative figures mean that the caller lost count, which would switch backpressure off: `ValueError`.
        """
        if in_flight_refs < 0 or in_flight_bytes < 0:
            raise ValueError(f"in flight cannot be negative: {in_flight_refs} references, {in_flight_bytes} bytes")
        marks = self.marks
        full = in_flight_refs >= marks.high_refs or (
            marks.high_bytes is not None and in_flight_bytes >= marks.high_bytes
        )
        drained = in_flight_refs <= marks.resume_refs and (
            marks.high_bytes is None or in_flight_bytes <= marks.resume_bytes
        )
        if self.paused and drained and not full:
            self.paused = False
            self._paused_before += self.clock() - self._paused_since
        elif not self.paused and full:
            self.paused = True
            self.pauses += 1
            self._paused_since = self.clock()
        return not self.paused

    def may_admit(self, group: int, in_flight_refs: int, in_flight_bytes: int = 0) -> bool:
        """Return whether a group of prompts may be taken up, with what is admitted already counted as in flight.

        All of it has to fit under the high watermarks, however long its samples come to be.
        """
        if not self.may_publish(in_flight_refs, in_flight_bytes):
            return False
        marks = self.marks
        most = in_flight_bytes + group * marks.max_sample_bytes
        fits_bytes = marks.high_bytes is None or most <= marks.high_bytes
        return in_flight_refs + group <= marks.high_refs and fits_bytes

    @property
    def paused_s(self) -> float:
        """Seconds that publishing was paused so far: the producer waited for the consumer."""
        return self._paused_before + (self.clock() - self._paused_since if self.paused else 0.0)
