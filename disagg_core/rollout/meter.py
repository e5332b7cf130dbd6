"""The producer's figures: what was done, and where the time of its threads went."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from disagg_core.engines.contract import Captured, Stored


@dataclass
class _Sums:
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    captured: int = 0
    space_s: float = 0.0
    generate_s: float = 0.0
    prefill_s: float = 0.0
    d2h_s: float = 0.0
    put_s: float = 0.0
    put_beside_s: float = 0.0
    publish_s: float = 0.0

    def since(self, before: _Sums) -> _Sums:
        """Return what was added to `before`."""
        return _Sums(**{name: value - getattr(before, name) for name, value in vars(self).items()})


class RolloutMeter:
    """Adds up figures from several threads; `interval` returns them since it was last asked.

    Seconds with `_s` are sums over the `workers`, whose phases they are (`disagg_core.run.phases`), but for
    ``put_beside_s`` and ``publish_s``, which other threads spend meanwhile.
    """

    def __init__(self, workers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._workers = workers
        self._clock = clock
        self._lock = threading.Lock()
        self._sums = _Sums()
        self._before = _Sums()
        self._since = clock()

    def captured(self, sample: Captured | Stored) -> None:
        """Count one captured sample with its share of what a worker spent on it."""
        with self._lock:
            self._sums.captured += 1
            self._sums.generate_s += sample.generate_s
            self._sums.prefill_s += sample.capture_s
            self._sums.d2h_s += sample.copy_s
            if isinstance(sample, Stored):
                self._sums.put_s += sample.put_s

    def waited_for_putter(self, seconds: float) -> None:
        """Count what a worker waited until the samples before its own had gone to the store."""
        with self._lock:
            self._sums.put_s += seconds

    def put(self, seconds: float) -> None:
        """Count what a putter spent on storing samples."""
        with self._lock:
            self._sums.put_beside_s += seconds

    def published(self, samples: int, tokens: int, size_bytes: int, seconds: float) -> None:
        """Count references that were published by one call that took `seconds`."""
        with self._lock:
            self._sums.samples += samples
            self._sums.tokens += tokens
            self._sums.bytes += size_bytes
            self._sums.publish_s += seconds

    def blocked(self, total_s: float) -> None:
        """Note for how many seconds in all the consumer has held the workers up."""
        with self._lock:
            self._sums.space_s = total_s

    def interval(self) -> dict[str, float]:
        """Return the figures since the last call: rates, seconds of each phase, mean milliseconds a sample.

        ``other_s`` is what the workers spent on none of their phases. A sample counts when it is done: of a long batch
        the seconds come at once, and what they were counted as before is taken off ``other_s``, which may fall below 0.
        """
        with self._lock:
            now = self._clock()
            seconds, done = max(now - self._since, 1e-9), self._sums.since(self._before)
            self._before, self._since = _Sums(**vars(self._sums)), now
        busy = done.space_s + done.generate_s + done.prefill_s + done.d2h_s + done.put_s
        captured = max(done.captured, 1)
        figures = {
            "seconds": seconds,
            "workers": float(self._workers),
            "samples": float(done.samples),
            "samples_per_s": done.samples / seconds,
            "tokens_per_s": done.tokens / seconds,
            "bytes_per_s": done.bytes / seconds,
            "capture_ms": 1e3 * done.prefill_s / captured,
            "copy_ms": 1e3 * done.d2h_s / captured,
            "put_ms": 1e3 * (done.put_s + done.put_beside_s) / captured,
            "publish_ms": 1e3 * done.publish_s / max(done.samples, 1),
            **{name: value for name, value in vars(done).items() if name.endswith("_s")},
            "other_s": self._workers * seconds - busy,
        }
        return {name: round(value, 4) for name, value in figures.items()}

    @property
    def totals(self) -> dict[str, float]:
        """The sums since the start, for the outcome and the report."""
        with self._lock:
            return {name: round(value, 4) for name, value in vars(self._sums).items()}
