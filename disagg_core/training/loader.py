"""From references to batches: windows of samples, shared out over ranks, fetched ahead of the step that needs them.

A window is the samples of one optimizer step: ranks x batch_size x accumulation_steps of them. Rank 0 takes its
references from the queue and tells the other ranks; each rank fetches its own share from the store while earlier
windows are trained. The last window of a stream may be short: what it lacks weighs zero. A sample that the store has
lost weighs zero too; it is quarantined with its reason when its window completes. Nothing is freed when it is read:
`complete` acknowledges a window and then removes its samples, after the optimizer step.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import torch
from torch import Tensor

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import SampleRef, ordinal_of
from disagg_core.drafts.method import Batch, Batcher, Sample
from disagg_core.errors import ChannelError, FailureClass, Preempted, SampleLost, SampleUnusable
from disagg_core.ordinals import OrdinalSet
from disagg_core.processes.interrupt import interruptible
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.transfers import GET_TROUBLE
from disagg_core.training.distributed import Ranks

PREFETCH_BYTES = 4 * 1024**3
"""Bytes of samples that one rank fetches ahead, besides the window in training."""
POLL_S = 0.5
"""A rank that waits for references or samples looks this often whether it has to stop."""
KEEPALIVE_S = 1.0
"""Rank 0 talks to the other ranks at least this often while it waits for references: one of them may have to stop."""

EndReason = Literal["end of stream", "stop requested", "stream failed"]
_log = logging.getLogger(__name__)


class _Command(msgspec.Struct, frozen=True):
    """What rank 0 tells the others in one round."""

    windows: list[list[SampleRef]]
    end: EndReason | None


class GivenUp(msgspec.Struct, frozen=True):
    """A sample that could not be trained on. `lost`: the store no longer has it, so it has to be captured again."""

    sample_id: str
    reason: str
    lost: bool


_json_encoder = msgspec.json.Encoder()
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Command)


@dataclass
class TrainingWindow:
    """One optimizer window on one rank.

    `refs` are all of the window, in published order; `own` those that this rank fetched, `given_up` what of
    these could not be used. `batches` are this rank's micro-batches; None weighs zero. Every rank has the
    same number of them. Of this rank, `live_positions` counts the positions that are trained on, `normalisers` what its
    batches add to the numbers that the window's loss is divided by, `tokens` its tokens.
    """

    refs: list[SampleRef]
    own: list[SampleRef]
    batches: list[Batch | None]
    live_positions: int
    normalisers: dict[str, float]
    tokens: int
    wait_s: float
    given_up: list[GivenUp] = field(default_factory=list)

    def oldest_age_s(self, now: float) -> float | None:
        """Seconds since the oldest sample of the window was captured; None where the references do not say."""
        captured = [ref.metadata["captured_at"] for ref in self.refs if "captured_at" in ref.metadata]
        return now - min(float(at) for at in captured if at is not None) if captured else None

    @property
    def samples(self) -> int:
        """Samples of this rank that are trained on."""
        return len(self.own) - len(self.given_up)


@dataclass
class _Pending:
    refs: list[SampleRef]
    shares: list[list[tuple[SampleRef, Future[dict[str, Tensor]]]]]

    def futures(self) -> list[Future[dict[str, Tensor]]]:
        return [future for share in self.shares for _ref, future in share]


def share_of(refs: Sequence[SampleRef], rank: int, size: int, batch_size: int, *, by_length: bool) -> list[list[int]]:
    """Return rank `rank`'s micro-batches of a window as indices into `refs`.

    Every rank gets the same number of micro-batches, and micro-batches of one round are alike in size on all ranks.
    With `by_length`, samples of like length share a micro-batch and longer ones come first, which saves padding and
    waiting; otherwise the published order is kept. A full window fills every micro-batch.
    """
    order = sorted(range(len(refs)), key=lambda i: -refs[i].num_tokens) if by_length else list(range(len(refs)))
    rounds = -(-len(refs) // (batch_size * size))
    base, longer = divmod(len(refs), max(1, rounds * size))
    shares = []
    for slot in range(rank, rounds * size, size):
        first = slot * base + min(slot, longer)
        shares.append(order[first : first + base + (slot < longer)])
    return shares


def _checked(sample: Sample) -> Sample:
    """Return `sample` if its states are finite; one that is not would end the run for all others."""
    for name, tensor in sample.tensors.items():
        if tensor.is_floating_point() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
            raise SampleUnusable(f"{name} is not finite: the target overflowed on this prompt")
    return sample


class FeatureDataLoader:
    """Iterates the optimizer windows of a stream, on every rank in step.

    Iteration ends with the stream, or after `request_stop` was called on any rank; `end_reason` tells which. When the
    stream fails, what was fetched is still delivered; then `failure` holds the error, on rank 0.
    """

    def __init__(
        self,
        queue: StreamingRefQueue | None,
        store: MooncakeFeatureStore,
        *,
        batcher: Batcher,
        batch_size: int,
        accumulation_steps: int = 1,
        channel: StreamingRefChannel | None = None,
        ranks: Ranks | None = None,
        prefetch_samples: int = 64,
        prefetch_bytes: int = PREFETCH_BYTES,
        pad_to_multiple_of: int = 1,
        trained: OrdinalSet | None = None,
    ) -> None:
        """Read references from `queue` (rank 0 only, None elsewhere) and samples from `store`; `batcher` collates them.

        `prefetch_samples` and `prefetch_bytes` bound what this rank fetches beyond the window that is trained.
        References to ordinals in `trained`, which the restored weights have seen, are quarantined.
        """
        self._queue = queue
        self._store = store
        self._channel = channel
        self._ranks = ranks or Ranks(0, 1, torch.device("cpu"), owns_group=False, control=None)
        assert (queue is not None) == self._ranks.is_first, "rank 0, and no other, reads the queue"
        self._batch_size = batch_size
        self._global_batch_size = self._ranks.size * batch_size * accumulation_steps
        self._batcher = batcher
        self._prefetch_samples = prefetch_samples
        self._prefetch_bytes = prefetch_bytes
        self._multiple_of = pad_to_multiple_of
        self._trained = trained if trained is not None else OrdinalSet()
        self._pending: deque[_Pending] = deque()
        self._partial: list[SampleRef] = []
        self._stop = False
        self._ending: EndReason | None = None
        self.end_reason: EndReason | None = None
        self.failure: ChannelError | None = None
        self.on_wait: Callable[[], None] = lambda: None

    @property
    def global_batch_size(self) -> int:
        """Samples of one full window over all ranks."""
        return self._global_batch_size

    def request_stop(self) -> None:
        """End the iteration on all ranks before the next window, also while they wait for its samples.

        May be called from a signal handler.
        """
        self._stop = True

    def __iter__(self) -> Iterator[TrainingWindow]:
        while True:
            started = time.monotonic()
            self._advance()
            if self.end_reason is not None:
                return
            if not self._arrived(self._pending[0]):
                self.end_reason = "stop requested"
                return
            yield self._collected(self._pending.popleft(), started)

    def close(self) -> None:
        """Drop what was fetched ahead. Transfers that run are not waited for: they end with the store's client."""
        for pending in self._pending:
            for future in pending.futures():
                future.cancel()
        self._pending.clear()

    # --- one round: which windows come next ---------------------------------------------------------------------

    def _advance(self) -> None:
        """Have at least one window pending, or set `end_reason`; the same on all ranks."""
        while True:
            stop = self._ranks.sum([float(self._stop)])[0] > 0
            command = self._next_command(stop) if self._queue is not None else None
            if self._ranks.size > 1:
                command = _decoder.decode(self._ranks.broadcast(_encoder.encode(command) if command else b""))
            assert command is not None
            for refs in command.windows:
                self._pending.append(self._dispatched(refs))
            if command.end == "stop requested" or (command.end and not self._pending):
                self.end_reason = command.end
                return
            if self._pending:
                return
            self.on_wait()

    def _next_command(self, stop: bool) -> _Command:
        """Take the windows that may be fetched now; wait for one if none is pending."""
        if stop:
            return _Command([], "stop requested")
        windows: list[list[SampleRef]] = []
        deadline = time.monotonic() + KEEPALIVE_S
        while self._ending is None:
            urgent = not self._pending and not windows
            if not urgent and not self._has_room_after(windows):
                break
            refs = self._take(timeout=POLL_S if urgent else 0.0)
            if refs:
                windows.append(refs)
            elif not urgent or self._stop or time.monotonic() > deadline:
                break
            elif self._ending is None:
                self.on_wait()
        return _Command(windows, self._ending)

    def _has_room_after(self, windows: list[list[SampleRef]]) -> bool:
        """Whether another window may be fetched: beyond the first, which is trained next, the bounds hold."""
        ahead = [pending.refs for pending in self._pending] + windows
        samples = sum(len(refs) for refs in ahead[1:]) + self._global_batch_size
        waiting = sum(ref.size_bytes for refs in ahead[1:] for ref in refs)
        size = self._ranks.size
        return samples <= self._prefetch_samples * size and waiting < self._prefetch_bytes * size

    def _take(self, timeout: float) -> list[SampleRef]:
        """Return the next window's references, or [] if there is none within `timeout` seconds."""
        assert self._queue is not None
        while True:
            missing = self._global_batch_size - len(self._partial)
            try:
                with interruptible(self._check_stop):
                    got = self._queue.get(missing, timeout=timeout)
            except (TimeoutError, Preempted):
                return []
            except ChannelError as error:
                _log.error("the stream broke off; what was fetched is trained first: %s", error)
                self.failure, self._ending = error, "stream failed"
                return []
            self._partial += self._untrained(got)
            if len(got) < missing:
                self._ending = "end of stream"
            if self._ending is not None or len(self._partial) == self._global_batch_size:
                refs, self._partial = self._partial, []
                return refs

    def _check_stop(self) -> None:
        if self._stop:
            raise Preempted("asked to stop while waiting for references")

    def _untrained(self, refs: list[SampleRef]) -> list[SampleRef]:
        """Return `refs` without those that the restored weights have seen; these are quarantined and removed."""
        assert self._queue is not None
        seen = [ref for ref in refs if ordinal_of(ref.sample_id) in self._trained]
        if seen:
            self._queue.fail(seen, "the restored weights were trained on it already", retryable=False)
            for ref in seen:
                self._store.abort(ref)
        return [ref for ref in refs if ref not in seen] if seen else refs

    # --- fetching -----------------------------------------------------------------------------------------------

    def _dispatched(self, refs: list[SampleRef]) -> _Pending:
        """Start fetching this rank's share of a window."""
        shares = share_of(refs, self._ranks.rank, self._ranks.size, self._batch_size, by_length=self._batcher.by_length)
        own = [[refs[index] for index in share] for share in shares]
        return _Pending(
            refs,
            [[(ref, self._store.submit_get(ref)) for ref in share] for share in own],
        )

    def _arrived(self, pending: _Pending) -> bool:
        """Wait for a window's samples on all ranks; False, on all, if one was asked to stop before all had theirs.

        A store that is away may keep a transfer for longer than there is time after a stop signal.
        """
        left: set[Future[dict[str, Tensor]]] = set(pending.futures())
        while True:
            left = wait(left, POLL_S).not_done
            missing, stops = self._ranks.sum([float(len(left)), float(self._stop)])
            if not missing or stops:
                return not missing

    def _collected(self, pending: _Pending, started: float) -> TrainingWindow:
        """Collate a window's samples, which have arrived."""
        own = [ref for share in pending.shares for ref, _future in share]
        nothing = dict.fromkeys(self._batcher.normalisers(None), 0.0)
        window = TrainingWindow(pending.refs, own, [], 0, nothing, 0, 0.0)
        for share in pending.shares:
            samples = []
            for ref, future in share:
                try:
                    samples.append(_checked(Sample(ref.sample_id, future.result())))
                except (SampleLost, SampleUnusable) as error:
                    _log.warning("sample %s weighs zero: %s", ref.sample_id, error)
                    window.given_up.append(GivenUp(ref.sample_id, str(error), lost=isinstance(error, SampleLost)))
            self._add(window, samples)
        window.wait_s = time.monotonic() - started
        return window

    def _add(self, window: TrainingWindow, samples: list[Sample]) -> None:
        """Add a micro-batch of `samples` to `window`; None where there is nothing in them to train on."""
        batch = self._batcher.collate(samples, multiple_of=self._multiple_of) if samples else None
        positions = self._batcher.trainable_positions(batch) if batch is not None else 0
        batch = batch if positions else None
        window.batches.append(batch)
        window.live_positions += positions
        window.tokens += sum(len(sample) for sample in samples)
        for name, value in self._batcher.normalisers(batch).items():
            window.normalisers[name] += value

    # --- after the step -----------------------------------------------------------------------------------------

    def complete(self, window: TrainingWindow, *, step: int) -> list[GivenUp]:
        """Acknowledge `window`, trained in optimizer step `step`, then remove its samples from the store.

        What any rank could not use is quarantined. Returns that on every rank.
        """
        given_up = self._given_up_anywhere(window)
        names = {item.sample_id for item in given_up}
        if self._queue is not None:
            by_name = {ref.sample_id: ref for ref in window.refs}
            for item in given_up:
                self._queue.fail([by_name[item.sample_id]], item.reason, retryable=False)
            self._queue.ack([ref for ref in window.refs if ref.sample_id not in names], step=step)
        self._store.release_many(window.own)
        return given_up

    def _given_up_anywhere(self, window: TrainingWindow) -> list[GivenUp]:
        if not self._ranks.sum([float(len(window.given_up))])[0]:
            return []
        messages = self._ranks.gather(_json_encoder.encode(window.given_up))
        return [item for message in messages for item in msgspec.json.decode(message, type=list[GivenUp])]

    @property
    def store_trouble(self) -> dict[str, int | float]:
        """Retries, damaged and lost samples and failed removals of this rank's store client so far."""
        counters = self._store.counters
        return {name: counters[name] for name in GET_TROUBLE}

    @property
    def in_flight(self) -> int:
        """References that were published and not yet acknowledged; 0 on ranks that do not read the channel."""
        return self._channel.in_flight_remote() if self._channel is not None else 0

    def finish(self, reason: str) -> int:
        """Tell the producer that training is done; return how many published samples were left untrained."""
        self.close()
        left = self.in_flight
        if self._channel is not None:
            self._channel.finish(reason)
        return left

    def abandon(self, reason: str, failure_class: FailureClass) -> None:
        """Tell the producer that training failed."""
        if self._channel is not None:
            self._channel.abandon(reason, failure_class)
        self.close()
