"""The producer's drive loop: from prompts to a stream of references that always has an end or a failure.

`build_disagg_online_producer` puts source, target, store and channel together; the `drive_producer` that it returns
runs them until nothing is pending and nothing is leased, publishes in order, and ends the stream. Threads: one
per rollout worker, two putters, and the caller's, which publishes and watches. Work is refilled continuously: a worker
asks for its next prompts as soon as it has handed over the last ones.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.patience import patience
from disagg_core.contracts import PromptTask, RunIdentity, SampleRef, StreamTotals, ordinal_of, sample_id_of
from disagg_core.engines.contract import Target
from disagg_core.errors import (
    AccountingError,
    BadInput,
    ChannelClosed,
    ChannelError,
    DraftlineError,
    Preempted,
    RoleFailed,
    StoreError,
    classify,
)
from disagg_core.processes.retry import join_all
from disagg_core.processes.shutdown import DRIVE_S
from disagg_core.rollout.meter import RolloutMeter
from disagg_core.rollout.pipeline import FAILURES_IN_ROW, Pipeline, largest_group
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.rollout.work import WorkNotes
from disagg_core.rollout.worker import Putters, RolloutWorker
from disagg_core.run.watermarks import Watermarks
from disagg_core.run_spec.document import RolloutSection
from disagg_core.store import MooncakeFeatureStore

log = logging.getLogger(__name__)

_PUBLISH_TOGETHER = 256
_WAIT_S = 0.05
_LOOK_S = 0.25
_GLANCE_S = 0.02
_JOIN_S = 60.0
_CRASHES_IN_ROW = 4
"""A server that dies fails all that is under way at once; so many times in a row is no accident."""


@dataclass(frozen=True)
class DriveState:
    """What the producer is doing, for progress and metrics; `rejected` includes quarantined prompts."""

    published: int
    published_bytes: int
    rejected: int
    admitted: int
    in_flight: int
    blocked: bool
    blocked_s: float
    final: bool = False


class Drive:
    """One producer's run over its prompts. Call it once; `request_stop` may come from a signal handler."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        workers: Sequence[RolloutWorker],
        putters: Putters,
        store: MooncakeFeatureStore,
        channel: StreamingRefChannel,
        meter: RolloutMeter,
        target: Target,
        on_tick: Callable[[DriveState, RolloutMeter], None],
    ) -> None:
        self._pipeline = pipeline
        self._workers = workers
        self._putters = putters
        self._store = store
        self._channel = channel
        self._meter = meter
        self._on_tick = on_tick
        self._patiently = patience(self._check_stop)
        self._work = WorkNotes(target, channel.note_progress, busy_since=self._busy_since)
        self._stop_reason: str | None = None
        self._before = 0
        self._threads: list[threading.Thread] = []

    def request_stop(self, reason: str) -> None:
        """Ask for an orderly end: the stream then ends as failed, class ``preempted``, with `reason`."""
        self._stop_reason = reason

    def __call__(self) -> StreamTotals:
        """Capture, store and publish every prompt, end the stream, and return its totals.

        Returns early, with totals of what was published, when the consumer is done.

        Raises:
            ChannelBusy: another producer writes the channel; its stream is left alone.
            Preempted: `request_stop` was called.
            RoleFailed: the consumer has failed or is gone.
            TargetUnavailable, StoreError, ChannelError, BadInput: what ended the run; a channel that is away for less
                than a minute does not. In all of these cases the stream ends with a failure record that gives the
                reason.
        """
        self._channel.claim_writer()
        try:
            self._resume()
            self._start()
            self._publish_until_finished()
            self._end_threads(_JOIN_S)
            totals = self._totals()
            self._free_unpublished()
            self._patiently(self._channel.close, totals)
            self._on_tick(self.state(final=True), self._meter)
        except BaseException as error:
            self._end_badly(error)
            raise
        return totals

    # --- start -----------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Leave out what an earlier producer of this attempt has published, and free what it left unpublished."""
        published = self._patiently(lambda: [ordinal_of(name) for name in self._channel.published_sample_ids()])
        source = self._pipeline.source
        source.skip_done(published)
        self._before = len(published)
        if published:
            log.info("continuing after %d published samples", len(published))
        if self._store.key_count() > self._patiently(self._channel.in_flight_remote):
            for ordinal in source.upcoming(self._pipeline.most_admitted):
                self._store.sweep(f"{self._store.namespace}/{sample_id_of(ordinal)}")

    def _start(self) -> None:
        self._putters.start()
        for worker in self._workers:
            thread = threading.Thread(target=worker.run, name=f"rollout-{worker.name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    # --- the loop --------------------------------------------------------------------------------------------------

    def _publish_until_finished(self) -> None:
        looked = 0.0
        while not self._pipeline.finished:
            refs = self._pipeline.pop_ready(_PUBLISH_TOGETHER)
            if refs:
                self._publish(refs)
            now = time.monotonic()
            if now - looked >= _LOOK_S:
                looked = now
                self._look()
            if self._pipeline.stopping:
                if self._pipeline.error is not None:
                    raise self._pipeline.error
                return
            if not refs:
                self._wait()

    def _wait(self) -> None:
        """Wait until something is ready to publish, or, when a worker waits for room, until the consumer has moved."""
        if self._pipeline.blocked:
            glance_s = _GLANCE_S if self._pipeline.admitted else _LOOK_S
            self._patiently(self._channel.wait_for_reader_change, glance_s)
            self._pipeline.wake()
            return
        with self._pipeline.changed:
            if not self._pipeline.something_ready:
                self._pipeline.changed.wait(_WAIT_S)

    def _look(self) -> None:
        """Look whether to stop, expire leases, and report."""
        self._check_stop()
        self._pipeline.expire()
        self._work.look()
        reader = self._patiently(self._channel.reader_status)
        if reader.state == "done":
            log.info("the consumer is done (%s): no more samples are needed", reader.reason)
            self._pipeline.stop()
        elif reader.state == "failed":
            raise RoleFailed(f"stopped because {reader.describe()}", "stalled")
        elif reader.state == "lost":  # its watcher, who could say more, may come to it only after our end
            raise RoleFailed(f"stopped because {reader.describe()}", "preempted")
        self._meter.blocked(self._pipeline.blocked_s)
        self._on_tick(self.state(), self._meter)

    def _busy_since(self) -> float | None:
        return max((since for worker in self._workers if (since := worker.busy_since) is not None), default=None)

    def _check_stop(self) -> None:
        if self._stop_reason is not None:
            raise Preempted(self._stop_reason)

    @property
    def figures(self) -> dict[str, float]:
        """Sums over the whole drive: samples, tokens, bytes, and seconds of each step."""
        return self._meter.totals

    def state(self, *, final: bool = False) -> DriveState:
        """Return what the producer is doing."""
        pipeline = self._pipeline
        return DriveState(
            published=self._channel.published,
            published_bytes=self._channel.published_bytes,
            rejected=pipeline.source.rejected,
            admitted=pipeline.admitted,
            in_flight=self._patiently(self._channel.in_flight_remote),
            blocked=pipeline.blocked == len(self._workers),
            blocked_s=pipeline.blocked_s,
            final=final,
        )

    def _publish(self, refs: list[SampleRef]) -> None:
        began = time.monotonic()
        self._patiently(self._channel.publish_many, refs)
        spent = time.monotonic() - began
        self._pipeline.published([ordinal_of(ref.sample_id) for ref in refs])
        self._meter.published(
            len(refs), sum(ref.num_tokens for ref in refs), sum(ref.size_bytes for ref in refs), spent
        )

    # --- the end ---------------------------------------------------------------------------------------------------

    def _totals(self) -> StreamTotals:
        """Return the totals of the attempt.

        Raises:
            AccountingError: prompts taken are not those published and rejected.
            BadInput: every single prompt was rejected.
        """
        source = self._pipeline.source
        refs, rejected = self._channel.published, source.rejected
        answered = self._before + source.taken
        if self._pipeline.stopping:
            answered = refs + rejected  # the consumer is done: what was leased or stored is nobody's loss
        if answered != refs + rejected:
            raise AccountingError(f"{answered} prompts were taken, but {refs} published and {rejected} rejected")
        if rejected and not refs and not source.covered:
            raise BadInput(f"all {rejected} prompts were rejected; rejected.jsonl in the attempt's state names reasons")
        return StreamTotals(refs=refs, bytes=self._channel.published_bytes, prompts=answered, rejected=rejected)

    def _end_threads(self, limit_s: float) -> None:
        """End workers, then putters; leave behind what does not end within `limit_s` seconds."""
        self._pipeline.wake()
        deadline = time.monotonic() + limit_s
        alive = join_all(self._threads, limit_s)
        ended = self._putters.close(max(0.0, deadline - time.monotonic()))
        if alive or not ended:
            log.warning("left behind after %.0f s: %s", limit_s, ", ".join(thread.name for thread in alive) or "a put")

    def _free_unpublished(self) -> None:
        for ref in self._pipeline.drain():
            self._store.abort(ref)

    def _end_badly(self, error: BaseException) -> None:
        """Stop the threads, free what was not published, and say in the stream why it ends."""
        self._pipeline.stop(error)
        self._end_threads(DRIVE_S)
        try:
            self._free_unpublished()
        except StoreError:
            log.warning("could not free unpublished samples", exc_info=True)
        reason = str(error) if isinstance(error, DraftlineError) else f"{type(error).__name__}: {error}"
        try:
            self._channel.fail(reason, classify(error))
        except ChannelClosed:
            log.info("the stream has its end already")
        except ChannelError:
            log.exception("could not write the failure into the stream")


def build_disagg_online_producer(
    *,
    prompts: PromptSource | Sequence[PromptTask],
    target: Target,
    store: MooncakeFeatureStore,
    channel: StreamingRefChannel,
    identity: RunIdentity,
    rollout: RolloutSection,
    window: int,
    max_sample_bytes: int = 0,
    watermarks: Watermarks | None = None,
    bytes_of: Callable[[PromptTask], int] | None = None,
    unavailable_timeout_s: float = 600.0,
    on_tick: Callable[[DriveState, RolloutMeter], None] = lambda state, meter: None,
) -> tuple[list[RolloutWorker], Drive]:
    """Put a producer together; return its workers and ``drive_producer``, which runs it.

    Args:
        prompts: where the prompts come from, or the tasks themselves.
        target: prepared with `identity`.
        store: what the samples are put into.
        channel: what the references are published to; this process becomes its writer when the drive starts.
        identity: what every reference carries.
        rollout: workers, order and watermarks. Byte watermarks are off when `rollout` has none.
        window: samples of one optimizer step (`RunSpec.global_batch_size`).
        max_sample_bytes: the largest sample, for the byte watermarks.
        watermarks: those that a plan has resolved (`RunPlan.watermarks`), in place of what the three above say.
        bytes_of: the most bytes that the sample of one task can take; by default those of the largest.
        unavailable_timeout_s: without a usable server for this long the run fails.
        on_tick: called a few times a second from the driving thread.

    Raises:
        SpecError: a watermark is smaller than the window.
    """
    marks = watermarks or Watermarks.resolve(rollout, window, max_sample_bytes=max_sample_bytes)
    source = _source_of(prompts, marks, target, rollout)
    workers_wanted = max(rollout.workers, target.concurrency)
    pipeline = _pipeline_of(
        source, marks, rollout, channel, bytes_of or (lambda task: marks.max_sample_bytes), workers_wanted
    )
    meter = RolloutMeter(workers_wanted)
    putters = Putters(pipeline, store, identity, meter)
    workers = _workers_of(workers_wanted, pipeline, target, putters, store, meter, unavailable_timeout_s)
    return workers, Drive(
        pipeline=pipeline,
        workers=workers,
        putters=putters,
        store=store,
        channel=channel,
        meter=meter,
        target=target,
        on_tick=on_tick,
    )


def _workers_of(
    count: int,
    pipeline: Pipeline,
    target: Target,
    putters: Putters,
    store: MooncakeFeatureStore,
    meter: RolloutMeter,
    unavailable_timeout_s: float,
) -> list[RolloutWorker]:
    return [
        RolloutWorker(
            f"worker-{number}",
            pipeline=pipeline,
            target=target,
            putters=putters,
            store=store,
            meter=meter,
            unavailable_timeout_s=unavailable_timeout_s,
        )
        for number in range(count)
    ]


def _source_of(
    prompts: PromptSource | Sequence[PromptTask], marks: Watermarks, target: Target, rollout: RolloutSection
) -> PromptSource:
    if isinstance(prompts, PromptSource):
        return prompts
    group = largest_group(marks, target.batch_size)
    return PromptSource.of_tasks(prompts, group=group, max_attempts=rollout.max_prompt_attempts)


def _pipeline_of(
    source: PromptSource,
    marks: Watermarks,
    rollout: RolloutSection,
    channel: StreamingRefChannel,
    sample_bytes: Callable[[PromptTask], int],
    workers: int,
) -> Pipeline:
    def in_flight() -> tuple[int, int]:
        return channel.in_flight_remote(), channel.in_flight_bytes_remote()

    return Pipeline(
        source,
        marks,
        ordered=rollout.ordered,
        in_flight=in_flight,
        sample_bytes=sample_bytes,
        failures_in_row=max(FAILURES_IN_ROW, _CRASHES_IN_ROW * workers),
    )
