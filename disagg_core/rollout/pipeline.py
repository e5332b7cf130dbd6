"""What the threads of a producer share: admission under the watermarks, open leases, finished references, figures.

A prompt passes through here once::

    admitted (reserves room) -> leased -> captured -> stored -> in its turn -> published (room is in flight remotely)

Room is reserved when a group of prompts is admitted and in prompt order, so that no later sample can take the place
of an earlier one: whatever is admitted can be stored and published without waiting for anybody. The reservation
becomes "in flight" when the reference is published, and falls away when the consumer acknowledges it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from disagg_core.contracts import PromptTask, SampleRef
from disagg_core.errors import ChannelUnavailable, TargetUnavailable
from disagg_core.rollout.flow_control import FlowControl
from disagg_core.rollout.leases import Lease
from disagg_core.rollout.prompt_source import PromptBatch, PromptSource
from disagg_core.rollout.reorder import ReorderBuffer
from disagg_core.run.watermarks import Watermarks

_LOOK_S = 0.1
FAILURES_IN_ROW = 32
"""So many failed attempts without a sample between them are the target's fault and not the prompts'."""


def largest_group(marks: Watermarks, wanted: int) -> int:
    """Return how many prompts a group may have, at most `wanted`, so that one can always be admitted.

    A consumer that has acknowledged every whole window leaves up to a window less one in flight; the rest of the
    high watermark has to hold a group.
    """
    room = marks.high_refs - marks.window + 1
    if marks.high_bytes is not None and marks.max_sample_bytes:
        room = min(room, marks.high_bytes // marks.max_sample_bytes - marks.window + 1)
    return max(1, min(wanted, room))


class Pipeline:
    """The shared state of workers, putters and the drive loop. Every method may be called from any thread."""

    def __init__(
        self,
        source: PromptSource,
        marks: Watermarks,
        *,
        ordered: bool,
        in_flight: Callable[[], tuple[int, int]],
        sample_bytes: Callable[[PromptTask], int],
        failures_in_row: int = FAILURES_IN_ROW,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if source.group > (most := largest_group(marks, source.group)):
            raise ValueError(
                f"groups of {source.group} prompts do not fit between a window of {marks.window} and the high "
                f"watermark of {marks.high_refs} references; make groups of at most {most}, or raise the watermarks"
            )
        self.source = source
        self._marks = marks
        self._flow = FlowControl(marks)
        self._in_flight = in_flight
        self._sample_bytes = sample_bytes
        self._clock = clock
        self._reorder: ReorderBuffer[SampleRef] = ReorderBuffer(ordered=ordered)
        self._reserved: dict[int, int] = {}
        self._reserved_bytes = 0
        self.changed = threading.Condition()
        # Looking for room and reserving it must be one step, or two workers take the same room. Not under `changed`:
        # the look asks the channel, which may be slow to answer, and finished samples must not wait for that.
        self._admitting = threading.Lock()
        self.stopping = False
        self.error: BaseException | None = None
        self.blocked = 0
        self.blocked_s = 0.0
        self._unavailable_since: float | None = None
        self._failures_in_row = 0
        self._most_failures = failures_in_row

    # --- stopping --------------------------------------------------------------------------------------------------

    def stop(self, error: BaseException | None = None) -> None:
        """Let every thread end after what it is doing; the first error is kept."""
        with self.changed:
            self.stopping = True
            if self.error is None:
                self.error = error
            self.changed.notify_all()

    def wake(self) -> None:
        """Let waiting threads look again."""
        with self.changed:
            self.changed.notify_all()

    # --- admission -------------------------------------------------------------------------------------------------

    def next_batch(self, worker: str) -> PromptBatch | None:
        """Lease work to `worker`, waiting for room or for prompts to come back; None when there is no more to do."""
        while not self.stopping:
            with self._admitting:
                # What came back has its room still, so it does not wait for the watermarks. It must not: in order,
                # everything behind it waits to be published, and their room comes back only then.
                batch = self.source.lease_again(worker)
                if batch is not None:
                    return batch
                if self.source.exhausted:
                    if self.source.drained:
                        return None
                elif self._has_room():
                    batch = self.source.lease_next(worker)
                    if batch is not None:
                        self._reserve(batch)
                        return batch
                    continue
            self._wait_for_room()
        return None

    def _wait_for_room(self) -> None:
        waiting_for_consumer = not self.source.exhausted
        began = self._clock()
        with self.changed:
            self.blocked += waiting_for_consumer
            self.changed.wait(_LOOK_S)  # bounded: room that came between the look and this wait wakes nobody
            self.blocked -= waiting_for_consumer
            self.blocked_s += (self._clock() - began) if waiting_for_consumer else 0.0

    def _has_room(self) -> bool:
        # Reservations first: a reference that is published between the two looks then counts twice, which only delays.
        # The other way round it would count in neither, and more would be admitted than the watermark allows.
        with self.changed:
            refs, size = len(self._reserved), self._reserved_bytes
        try:
            remote_refs, remote_bytes = self._in_flight()
        except ChannelUnavailable:  # nothing is admitted meanwhile; for how long that may last, the drive loop says
            return False
        return self._flow.may_admit(self.source.group, refs + remote_refs, size + remote_bytes)

    def _reserve(self, batch: PromptBatch) -> None:
        with self.changed:
            for task in batch.tasks:
                if task.ordinal in batch.leases:
                    self._reorder.expect(task.ordinal)
                    size = self._sample_bytes(task)
                    self._reserved[task.ordinal] = size
                    self._reserved_bytes += size

    def _unreserve(self, ordinal: int) -> None:
        self._reserved_bytes -= self._reserved.pop(ordinal)

    # --- answers ---------------------------------------------------------------------------------------------------

    def stored(self, lease: Lease, ref: SampleRef) -> bool:
        """Take a finished reference; False if its lease is stale and the sample has to be freed by the caller."""
        with self.changed:
            if self.stopping or not self.source.complete(lease):
                return False
            self._reorder.put(lease.ordinal, ref)
            self._unavailable_since = None
            self.changed.notify_all()
            return True

    def failed(self, lease: Lease, reason: str, server: str) -> None:
        """Count a failed attempt; the prompt goes back, or out if it was the last one.

        The target's failures in a row, whosever prompts, end the run: that many bad prompts do not stand together.
        """
        with self.changed:
            self._count_failure(reason)
            if self.source.fail(lease, reason, server):
                self._dropped(lease.ordinal)
            self.changed.notify_all()

    def rejected(self, lease: Lease, reason: str, *, own_form: bool = False) -> None:
        """Take a prompt out for good; one that is out for its own form is no failure of the target's."""
        with self.changed:
            if not own_form:
                self._count_failure(reason)
            if self.source.reject(lease, reason, own_form=own_form):
                self._dropped(lease.ordinal)
            self._unavailable_since = None
            self.changed.notify_all()

    def given_back(self, lease: Lease) -> None:
        """Take a prompt back that was not attempted."""
        with self.changed:
            self.source.give_back(lease)
            self.changed.notify_all()

    def expire(self) -> None:
        """Take back the leases that are overdue."""
        with self.changed:
            for ordinal in self.source.expire():
                self._dropped(ordinal)
            self.changed.notify_all()

    def _count_failure(self, reason: str) -> None:
        self._failures_in_row += 1
        if self._failures_in_row >= self._most_failures and not self.stopping:
            self.stop(
                TargetUnavailable(
                    f"the target failed {self._failures_in_row} times in a row, whatever the prompt; the last time: "
                    f"{reason}; look at its GPU and its log"
                )
            )

    def _dropped(self, ordinal: int) -> None:
        self._reorder.drop(ordinal)
        self._unreserve(ordinal)

    # --- availability ----------------------------------------------------------------------------------------------

    def unavailable(self) -> float:
        """Note that no server is usable; return for how many seconds that has been so."""
        with self.changed:
            if self._unavailable_since is None:
                self._unavailable_since = self._clock()
            return self._clock() - self._unavailable_since

    def available(self) -> None:
        """Note that the target has captured something."""
        with self.changed:
            self._failures_in_row = 0
            self._unavailable_since = None

    # --- publication -----------------------------------------------------------------------------------------------

    def pop_ready(self, limit: int) -> list[SampleRef]:
        """Return the references whose turn it is; they stay reserved until `published`."""
        with self.changed:
            return self._reorder.pop_ready(limit)

    def published(self, ordinals: list[int]) -> None:
        """Turn the reservations of published references into what is in flight remotely."""
        with self.changed:
            for ordinal in ordinals:
                self._unreserve(ordinal)
            self.changed.notify_all()

    def drain(self) -> list[SampleRef]:
        """Return the stored references that will not be published."""
        with self.changed:
            return self._reorder.drain()

    @property
    def something_ready(self) -> bool:
        """Whether `pop_ready` would return something."""
        with self.changed:
            return self._reorder.has_ready

    @property
    def most_admitted(self) -> int:
        """The most prompts that can be admitted and unpublished at a time."""
        return self._marks.high_refs

    @property
    def admitted(self) -> int:
        """Prompts that were admitted and are neither published nor rejected."""
        with self.changed:
            return len(self._reserved)

    @property
    def finished(self) -> bool:
        """Whether every prompt is published or rejected."""
        # A drained source is not enough: it is done with a prompt as soon as its sample is stored.
        with self.changed:
            return not self._reserved and self.source.drained

    @property
    def paused_s(self) -> float:
        """Seconds for which the watermarks held admission up."""
        return self._flow.paused_s
