"""The threads of a producer that do the work: rollout workers capture, putters store. They never decide about the run.

A worker leases prompts, hands them to the target and passes on each outcome; a putter takes captured tensors to the
feature store while the target computes the next ones. What goes wrong with a prompt is an answer under its lease; what
goes wrong with the store or in our own code stops the pipeline with that error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from disagg_core.contracts import RunIdentity, SampleRef
from disagg_core.engines.contract import Captured, CaptureOutcome, Failed, Stored, Target
from disagg_core.errors import BadInput, TargetUnavailable
from disagg_core.processes.interrupt import interruptible
from disagg_core.processes.retry import join_all
from disagg_core.rollout.leases import Lease
from disagg_core.rollout.meter import RolloutMeter
from disagg_core.rollout.pipeline import Pipeline
from disagg_core.rollout.prompt_source import PromptBatch
from disagg_core.store import NewSample

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 1.0
_PUT_TOGETHER = 16
_PUTTERS = 2
QUEUED_BYTES = 512 * 1024**2
"""Captured tensors that wait for the store; a worker with more in hand waits itself."""


class SampleStore(Protocol):
    """What a producer needs of the feature store."""

    def put_many(self, samples: Sequence[NewSample], *, identity: RunIdentity) -> list[SampleRef]:
        """Store samples; see `MooncakeFeatureStore.put_many`."""
        ...

    def abort(self, ref: SampleRef) -> None:
        """Free a sample that nobody will consume."""
        ...


class Putters:
    """Threads that take captured samples to the store and hand their references to the pipeline."""

    def __init__(self, pipeline: Pipeline, store: SampleStore, identity: RunIdentity, meter: RolloutMeter) -> None:
        self._pipeline = pipeline
        self._store = store
        self._identity = identity
        self._meter = meter
        self._queue: deque[tuple[Lease, Captured]] = deque()
        self._queued_bytes = 0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, name=f"rollout-put-{number}", daemon=True) for number in range(_PUTTERS)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, lease: Lease, captured: Captured) -> None:
        """Queue a sample; waits while too many bytes are queued already."""
        size, began = _bytes_of(captured.tensors), time.perf_counter()
        self._meter.captured(captured)
        with self._changed:
            while self._queued_bytes > QUEUED_BYTES and not self._pipeline.stopping:
                self._changed.wait(0.1)
            self._queue.append((lease, captured))
            self._queued_bytes += size
            self._changed.notify_all()
        self._meter.waited_for_putter(time.perf_counter() - began)

    def close(self, timeout_s: float) -> bool:
        """Store what is queued (nothing once the pipeline is stopping), end the threads; True if they ended in time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return not join_all(self._threads, timeout_s)

    def _take(self) -> list[tuple[Lease, Captured]]:
        """Return the next samples to store; none at the end."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            taken = [self._queue.popleft() for _ in range(min(_PUT_TOGETHER, len(self._queue)))]
            self._queued_bytes -= sum(_bytes_of(captured.tensors) for _, captured in taken)
            self._changed.notify_all()
            return taken

    def _run(self) -> None:
        try:
            while taken := self._take():
                wanted = [] if self._pipeline.stopping else [t for t in taken if self._pipeline.source.holds(t[0])]
                if wanted:
                    self._put(wanted)
        except BaseException as error:  # noqa: BLE001 - the drive loop raises it
            self._pipeline.stop(error)

    def _put(self, items: list[tuple[Lease, Captured]]) -> None:
        began = time.perf_counter()
        samples = [_new_sample(captured) for _, captured in items]
        try:
            refs = self._store.put_many(samples, identity=self._identity)
        except BadInput as error:
            if len(items) == 1:
                lease, captured = items[0]
                self._pipeline.rejected(lease, f"the sample cannot be stored: {error}")
                log.warning("prompt %d: %s", captured.task.ordinal, error)
                return
            for item in items:
                self._put([item])
            return
        self._meter.put(time.perf_counter() - began)
        for (lease, _captured), ref in zip(items, refs, strict=True):
            if not self._pipeline.stored(lease, ref):
                self._store.abort(ref)


def _bytes_of(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _new_sample(captured: Captured) -> NewSample:
    return NewSample(
        sample_id=captured.task.sample_id,
        tensors=captured.tensors,
        source_task_id=captured.task.source,
        num_tokens=captured.num_tokens,
        metadata={"server": captured.server, "captured_at": round(time.time(), 3)},
    )


class _Stopped(Exception):
    """The pipeline stops, and nobody waits for what this thread computes."""


class RolloutWorker:
    """Leases prompts, has them captured, and answers for every one of them.

    `run` is the thread's body: it returns when there is no more work or the pipeline stops.
    """

    def __init__(
        self,
        name: str,
        *,
        pipeline: Pipeline,
        target: Target,
        putters: Putters,
        store: SampleStore,
        meter: RolloutMeter,
        unavailable_timeout_s: float,
    ) -> None:
        self.name = name
        self._pipeline = pipeline
        self._target = target
        self._putters = putters
        self._store = store
        self._meter = meter
        self._unavailable_timeout_s = unavailable_timeout_s
        self._pause_s = 0.05
        self.busy_since: float | None = None
        """When the target was handed the work that it has given no outcome of yet; None when it has none."""

    def run(self) -> None:
        """Work until nothing is left or the pipeline stops."""
        try:
            with interruptible(self._check_stopping):
                while (batch := self._pipeline.next_batch(self.name)) is not None:
                    self.capture(batch)
        except _Stopped:
            log.info("%s ends in the middle of a batch: the pipeline stops", self.name)
        except BaseException as error:  # noqa: BLE001 - the drive loop raises it
            self._pipeline.stop(error)

    def _check_stopping(self) -> None:
        if self._pipeline.stopping:
            raise _Stopped

    def capture(self, batch: PromptBatch) -> None:
        """Have one batch captured and answer for each of its leases."""
        open_leases = dict(batch.leases)
        self.busy_since = time.monotonic()
        try:
            outcomes = self._target.capture(batch.tasks, avoid=batch.avoid)
            for outcome in outcomes:
                self.busy_since = time.monotonic()
                self._take(outcome, open_leases.pop(outcome.task.ordinal, None))
                if self._pipeline.stopping:
                    break
            else:
                for lease in open_leases.values():
                    self._pipeline.failed(lease, "the target gave no outcome", "unknown")
                open_leases.clear()
        except TargetUnavailable as error:
            self.busy_since = None
            self._wait_for_target(error)
        finally:
            self.busy_since = None
            for lease in open_leases.values():
                self._pipeline.given_back(lease)

    def _take(self, outcome: CaptureOutcome, lease: Lease | None) -> None:
        """Pass an outcome on; without a lease the prompt was only there to complete its batch."""
        if not isinstance(outcome, Failed):
            self._pipeline.available()
            self._pause_s = 0.05
        match outcome:
            case Captured() if lease is not None:
                self._putters.submit(lease, outcome)
            case Stored(ref=ref):
                self._meter.captured(outcome)
                if lease is None or not self._pipeline.stored(lease, ref):
                    self._store.abort(ref)
            case Failed(reason=reason, retryable=True, server=server) if lease is not None:
                log.warning("prompt %d failed on %s: %s", lease.ordinal, server, reason)
                self._pipeline.failed(lease, reason, server)
            case Failed(reason=reason, own_form=own_form) if lease is not None:
                self._pipeline.rejected(lease, reason, own_form=own_form)

    def _wait_for_target(self, error: TargetUnavailable) -> None:
        """Pause after the target was not available; stop the run if that has been so for too long."""
        away_s = self._pipeline.unavailable()
        if away_s >= self._unavailable_timeout_s:
            message = f"no server was usable for {away_s:.0f} s (target.unavailable_timeout_s): {error}"
            self._pipeline.stop(TargetUnavailable(message))
            return
        with self._pipeline.changed:
            self._pipeline.changed.wait(min(self._pause_s, self._unavailable_timeout_s))
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
