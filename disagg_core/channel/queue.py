"""`StreamingRefQueue`: the channel as the loader wants it: blocking batches, retries in front, quarantine."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

from disagg_core.channel.channel import StreamingRefChannel
from disagg_core.contracts import SampleRef, StreamTotals

logger = logging.getLogger(__name__)


class StreamingRefQueue:
    """Hands out references in published order; what is put back comes first, again in published order.

    For one thread that gets and one that acknowledges, as the loader has them.
    """

    def __init__(self, channel: StreamingRefChannel, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._channel = channel
        self._clock = clock
        self._ready: deque[SampleRef] = deque()
        self._order: dict[str, int] = {}
        self._taken = 0
        self._ended = False
        self.quarantined: list[tuple[SampleRef, str]] = []
        """References given up, with the reason: acknowledged, and to be freed and reported by the caller."""

    @property
    def totals(self) -> StreamTotals | None:
        """What the end-of-stream record says, once it was read."""
        return self._channel.totals

    def get(self, n: int, timeout: float | None = None) -> list[SampleRef]:
        """Wait for `n` references; fewer come only at the end of the stream, and none only after it.

        Raises:
            TimeoutError: fewer than `n` came within `timeout` seconds; they are kept for the next call.
            ProducerFailed, ChannelStalled: see `StreamingRefChannel.poll`.
        """
        deadline = None if timeout is None else self._clock() + timeout
        while len(self._ready) < n and not self._ended:
            self._fetch(n - len(self._ready))
            if len(self._ready) >= n or self._ended:
                break
            left = None if deadline is None else deadline - self._clock()
            if left is not None and left <= 0:
                raise TimeoutError(
                    f"{self._channel.where}: {len(self._ready)} of {n} references came within {timeout:g} s; "
                    f"{self._channel.writer_status().describe()}"
                )
            self._channel.wait(1.0 if left is None else left)
        return [self._ready.popleft() for _ in range(min(n, len(self._ready)))]

    def _fetch(self, wanted: int) -> None:
        refs = self._channel.poll(wanted)
        for ref in refs:
            self._taken += 1
            self._order[ref.key] = self._taken
        self._ready.extend(refs)
        self._ended = self._channel.is_closed()

    def ack(self, refs: Iterable[SampleRef], step: int | None = None) -> None:
        """Acknowledge trained references; see `StreamingRefChannel.ack`."""
        refs = list(refs)
        self._channel.ack(refs, step=step)
        self._forget(refs)

    def fail(self, refs: Iterable[SampleRef], reason: str, retryable: bool = True) -> None:
        """Give references back: in front of the queue if they may be tried again, into quarantine if not.

        Quarantined references are acknowledged; freeing their samples is the caller's.
        """
        refs = list(refs)
        if retryable:
            unknown = [ref.key for ref in refs if ref.key not in self._order]
            if unknown:
                raise ValueError(f"expected references that this queue handed out, found {', '.join(unknown[:3])}")
            merged = {ref.key: ref for ref in (*refs, *self._ready)}
            self._ready = deque(sorted(merged.values(), key=lambda ref: self._order[ref.key]))
            return
        self._channel.quarantine(refs)
        self._forget(refs)
        for ref in refs:
            logger.warning("quarantined %s: %s", ref.sample_id, reason)
            self.quarantined.append((ref, reason))

    def _forget(self, refs: list[SampleRef]) -> None:
        for ref in refs:
            self._order.pop(ref.key, None)

    def depth(self) -> int:
        """Return how many references are published and not handed out at present."""
        return self._channel.published - self._channel.delivered + len(self._ready)
