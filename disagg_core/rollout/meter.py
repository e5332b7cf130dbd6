"""The producer's figures: what was done, how long each step took, how long the consumer held it up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Sums:
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    captured: int = 0
    capture_s: float = 0.0
    copy_s: float = 0.0
    put_s: float = 0.0
    publish_s: float = 0.0
    blocked_s: float = 0.0


class RolloutMeter:
    """Adds up figures from several threads; `interval` returns them since it was last asked."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._sums = _Sums()
        self._before = _Sums()
        self._since = clock()

    def stored(self, capture_s: float, copy_s: float, put_s: float) -> None:
        """Count one captured and stored sample with its share of each step's seconds."""
        with self._lock:
            self._sums.captured += 1
            self._sums.capture_s += capture_s
            self._sums.copy_s += copy_s
            self._sums.put_s += put_s

    def published(self, samples: int, tokens: int, size_bytes: int, seconds: float) -> None:
        """Count references that were published by one call that took `seconds`."""
        with self._lock:
            self._sums.samples += samples
            self._sums.tokens += tokens
            self._sums.bytes += size_bytes
            self._sums.publish_s += seconds

    def blocked(self, total_s: float) -> None:
        """Note for how many seconds in all the consumer has held the producer up."""
        with self._lock:
            self._sums.blocked_s = total_s

    def interval(self) -> dict[str, float]:
        """Return the figures since the last call: rates a second, and mean milliseconds a sample of each step."""
        with self._lock:
            now, sums, before = self._clock(), self._sums, self._before
            seconds = max(now - self._since, 1e-9)
            captured = max(sums.captured - before.captured, 1)
            samples = max(sums.samples - before.samples, 1)
            figures = {
                "seconds": seconds,
                "samples_per_s": (sums.samples - before.samples) / seconds,
                "tokens_per_s": (sums.tokens - before.tokens) / seconds,
                "bytes_per_s": (sums.bytes - before.bytes) / seconds,
                "capture_ms": 1e3 * (sums.capture_s - before.capture_s) / captured,
                "copy_ms": 1e3 * (sums.copy_s - before.copy_s) / captured,
                "put_ms": 1e3 * (sums.put_s - before.put_s) / captured,
                "publish_ms": 1e3 * (sums.publish_s - before.publish_s) / samples,
                "blocked_s": sums.blocked_s - before.blocked_s,
            }
            self._before = _Sums(**vars(sums))
            self._since = now
            return {name: round(value, 4) for name, value in figures.items()}

    @property
    def totals(self) -> dict[str, float]:
        """The sums since the start, for the outcome and the report."""
        with self._lock:
            return {name: round(value, 4) for name, value in vars(self._sums).items()}
