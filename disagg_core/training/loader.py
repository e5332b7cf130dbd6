"""From references to batches: windows of samples, shared out over ranks, fetched ahead of the step that needs them.

A window is the samples of one optimizer step: ranks x batch_size x accumulation_steps of them, where ranks that share
samples (context parallelism) count as one, and fetch the same. Rank 0 takes its
references from the queue and tells the other ranks; each rank fetches its own share from the store while earlier
windows are trained. The last window of a stream may be short: what it lacks weighs zero. A sample that the store has
lost weighs zero too; it is quarantined with its reason when its window completes. Nothing is freed when it is read: a
window is acknowledged after its step, and only then are its samples removed, both while the next one is trained.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Literal

import msgspec
import torch

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.channel.patience import CHANNEL_AWAY_S, CHANNEL_PAUSE_S, patience
from disagg_core.contracts import SampleRef, ordinal_of
from disagg_core.errors import ChannelError, ChannelUnavailable, FailureClass, Preempted
from disagg_core.ordinals import OrdinalSet
from disagg_core.processes.interrupt import interruptible
from disagg_core.run.phases import TrainingPhase
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.transfers import GET_TROUBLE
from disagg_core.training.distributed import Ranks
from disagg_core.training.inputs import DraftInput
from disagg_core.training.settling import Settling
from disagg_core.training.staging import POLL_S, PendingWindow, Stager, refused
from disagg_core.training.window import Cut, GivenUp, TrainingWindow

PREFETCH_BYTES = 4 * 1024**3
"""Bytes of samples that one rank fetches ahead, besides the window in training."""
KEEPALIVE_S = 1.0
"""Rank 0 talks to the other ranks at least this often while it waits for references: one of them may have to stop."""

EndReason = Literal["end of stream", "stop requested", "stream failed"]
_log = logging.getLogger(__name__)


class _Command(msgspec.Struct, frozen=True):
    """What rank 0 tells the others in one round; `at_once`: it ends before what was fetched is trained."""

    windows: list[list[SampleRef]]
    end: EndReason | None
    at_once: bool = False


_decoder = msgspec.msgpack.Decoder(_Command)


def _go_on_without() -> None:
    """End what asks the channel while there is something to train: it is tried once, and not waited for."""
    raise ChannelUnavailable("the channel is not waited for while there are samples to train on")


class FeatureDataLoader:
    """Iterates the optimizer windows of a stream, on every rank in step.

    Iteration ends with the stream, or after `request_stop` was called on any rank; `end_reason` tells which. When the
    stream fails, what was fetched is still delivered; then `failure` holds the error, on rank 0. So it does, on the
    rank that met it, when an acknowledgement or a fetch fails: all ranks end at the same step boundary. A
    channel that is away is waited for.
    """

    def __init__(
        self,
        queue: StreamingRefQueue | None,
        store: MooncakeFeatureStore,
        *,
        inputs: Sequence[DraftInput],
        batch_size: int,
        accumulation_steps: int = 1,
        channel: StreamingRefChannel | None = None,
        ranks: Ranks | None = None,
        prefetch_samples: int = 64,
        prefetch_bytes: int = PREFETCH_BYTES,
        pack_tokens: int | None = None,
        trained: OrdinalSet | None = None,
    ) -> None:
        """Read references from `queue` (rank 0 only, None elsewhere) and samples from `store`, for the draft of each of
        the `inputs`; see `Cut` for what is in a micro-batch.

        `prefetch_samples` and `prefetch_bytes` bound what this rank fetches beyond the window that is trained.
        References to ordinals in `trained`, which the restored weights have seen, are quarantined.
        """
        self._queue = queue
        self._store = store
        self._channel = channel
        self._ranks = ranks or Ranks(0, 1, torch.device("cpu"), owns_group=False, control=None)
        assert (queue is not None) == self._ranks.is_first, "rank 0, and no other, reads the queue"
        self._cut = Cut(
            batch_size,
            pack_tokens,
            by_length=all(reads.batcher.by_length for reads in inputs),
            packed=all(reads.packing is not False for reads in inputs),
        )
        self._global_batch_size = self._ranks.data_size * batch_size * accumulation_steps
        self._stager = Stager(inputs, self._ranks.device)
        self._settling = Settling(store)
        self._prefetch_samples = prefetch_samples
        self._prefetch_bytes = prefetch_bytes
        self._trained = trained if trained is not None else OrdinalSet()
        self._pending: deque[PendingWindow] = deque()
        self._partial: list[SampleRef] = []
        self._stop = False
        self._ending: EndReason | None = None
        self._patiently = patience(self._check_stop)
        self._away_since: float | None = None
        self._last_in_flight = 0
        self._handed_out = 0
        self.end_reason: EndReason | None = None
        self.failure: BaseException | None = None
        self.on_wait: Callable[[], None] = lambda: None
        self.before_waiting: Callable[[], object] = lambda: None
        """Is called on all ranks together when the next window is not there, before they wait for it."""
        self.on_progress: Callable[[str], None] = lambda what: None
        self.on_phase: Callable[[TrainingPhase], None] = lambda phase: None

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
            self.on_phase("refs")
            self._advance()
            if self.end_reason is not None:
                return
            self.on_phase("features")
            if not self._arrived(self._pending[0]):
                self.end_reason = self.end_reason or "stop requested"
                return
            self.on_phase("collate")
            window = self._stager.stage(self._pending.popleft()).result()
            if self._pending:  # its batches are made, and copied, while this window is trained
                self._stager.stage(self._pending[0])
            self._handed_out += len(window.refs)
            window.wait_s = time.monotonic() - started
            yield window

    def close(self) -> None:
        """Drop what was fetched ahead, and settle what was trained. Transfers end with the store's client."""
        self._stager.close()
        self._settling.close()
        for pending in self._pending:
            for transfer in pending.transfers():
                transfer.cancel()
        self._pending.clear()

    # --- one round: which windows come next ---------------------------------------------------------------------

    def _advance(self) -> None:
        """Have at least one window pending, or set `end_reason`; the same on all ranks."""
        while True:
            if self._ranks.sum([float(self._stop)])[0]:
                self._stop = True
            if not self._pending:
                self.before_waiting()
            command = self._next_command() if self._queue is not None else None
            if self._ranks.size > 1:
                command = _decoder.decode(self._ranks.broadcast(msgspec.msgpack.encode(command) if command else b""))
            assert command is not None
            for refs in command.windows:
                self._pending.append(self._dispatched(refs))
            if command.end == "stop requested" or command.at_once or (command.end and not self._pending):
                self.end_reason = command.end
                return
            if self._pending:
                return
            self.on_wait()

    def _next_command(self) -> _Command:
        """Take the windows that may be fetched now; wait for one if none is pending."""
        if self._stop:
            return _Command([], "stop requested")
        if not self._pending and not self._settling.wait(KEEPALIVE_S):
            return _Command([], None)  # the stream has not ended well before its last window is acknowledged
        if isinstance(self._settling.unacknowledged, ChannelError):
            self._fail(self._settling.unacknowledged, at_once=True)
            return _Command([], self._ending, at_once=True)
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
        size = self._ranks.data_size
        return samples <= self._prefetch_samples * size and waiting < self._prefetch_bytes * size

    def _take(self, timeout: float) -> list[SampleRef]:
        """Return the next window's references, or [] if there is none within `timeout` seconds."""
        assert self._queue is not None
        while True:
            missing = self._global_batch_size - len(self._partial)
            try:
                with interruptible(self._check_stop if timeout else _go_on_without):
                    got = self._queue.get(missing, timeout=timeout)
                    untrained = self._untrained(got)
            except (TimeoutError, Preempted) as error:
                self._away_since = self._away_since if isinstance(error, Preempted) else None
                return []
            except ChannelUnavailable as error:
                if timeout and not self._goes_on_waiting(error, timeout):
                    self._fail(error)
                return []
            except ChannelError as error:
                self._fail(error)
                return []
            self._away_since = None
            self._partial += untrained
            if len(got) < missing:
                self._ending = "end of stream"
            if self._ending is not None or len(self._partial) == self._global_batch_size:
                refs, self._partial = self._partial, []
                return refs

    def _goes_on_waiting(self, error: ChannelUnavailable, timeout: float) -> bool:
        """Pause, for no longer than `timeout`, and tell whether the channel may still come back.

        In short rounds rather than by `patience`: the other ranks have to hear of rank 0 meanwhile.
        """
        if self._away_since is None:
            self._away_since = time.monotonic()
            _log.warning("the channel is away, trying again for up to %g s: %s", CHANNEL_AWAY_S, error)
        time.sleep(min(timeout, CHANNEL_PAUSE_S))
        return time.monotonic() - self._away_since < CHANNEL_AWAY_S

    def _fail(self, error: BaseException, *, at_once: bool = False) -> None:
        """Let the iteration end with `error`, after what was fetched is trained or `at_once`."""
        _log.error("the stream broke off%s: %s", "" if at_once else "; what was fetched is trained first", error)
        self.failure, self._ending = error, "stream failed"

    def _check_stop(self) -> None:
        if self._stop:
            raise Preempted("asked to stop while waiting for references")

    def _untrained(self, refs: list[SampleRef]) -> list[SampleRef]:
        """Return `refs` without those that the restored weights have seen; these are quarantined and removed."""
        assert self._queue is not None
        seen = [ref for ref in refs if ordinal_of(ref.sample_id) in self._trained]
        if seen:
            try:
                self._patiently(self._queue.fail, seen, "the restored weights were trained on it", retryable=False)
            except ChannelUnavailable:
                self._queue.fail(refs, "none of them is in a window", retryable=True)
                raise
            for ref in seen:
                self._store.abort(ref)
        return [ref for ref in refs if ref not in seen] if seen else refs

    # --- fetching -----------------------------------------------------------------------------------------------

    def _dispatched(self, refs: list[SampleRef], without: Sequence[GivenUp] = ()) -> PendingWindow:
        """Start fetching this rank's share of a window, but for those samples that are given up already."""
        known = {item.sample_id: refused(item) for item in without}
        shares = self._cut.share(refs, self._ranks.data_rank, self._ranks.data_size)
        own = [[refs[index] for index in share] for share in shares]
        return PendingWindow(
            refs, [[(ref, known.get(ref.sample_id) or self._store.submit_get(ref)) for ref in share] for share in own]
        )

    def _arrived(self, pending: PendingWindow) -> bool:
        """Wait for a window's samples on all ranks; False, on all, if one was asked to stop before all had theirs.

        A store that is away may keep a transfer for longer than there is time after a stop signal. A rank whose store
        fails for good ends the iteration on all of them: `failure` holds its error there.
        """
        self._stager.stage(pending)
        waits = False
        while True:
            left = pending.unfinished()
            missing, stops = self._ranks.sum([float(left), float(self._stop)])
            if missing and stops:
                self._stop = True
                return False
            if not missing:
                break
            if not waits:
                self.before_waiting()
                waits = True
            wait(pending.work(), POLL_S)
            if pending.unfinished() < left:
                self.on_progress("fetching samples")
        if self._ranks.sum([float(pending.broken() is not None)])[0]:
            self.failure, self.end_reason = pending.broken(), "stream failed"
            return False
        return self._ranks.context is None or self._agreed(pending)

    def _agreed(self, pending: PendingWindow) -> bool:
        """As `_arrived`; ranks that share a sample, which one cannot use, fetch the others again and leave it out."""
        window = pending.staged_window()
        given_up = self.given_up_in(window)
        differs = bool(window.used & {item.sample_id for item in given_up})
        if not given_up or not self._ranks.sum([float(differs)])[0]:
            return True
        if differs:
            self._pending[0] = self._dispatched(pending.refs, given_up)
        return self._arrived(self._pending[0])

    # --- after the step -----------------------------------------------------------------------------------------

    def complete(self, window: TrainingWindow, *, step: int, given_up: list[GivenUp] | None = None) -> list[GivenUp]:
        """Begin to acknowledge `window`, trained in optimizer step `step`, and then to remove its samples.

        What any rank could not use, or what `given_up` says, which is the same on all ranks, is quarantined. Returns
        that on every rank. Training goes on meanwhile, see `Settling`. A channel that does not come back ends the
        iteration, with `failure`: the weights hold what was trained and are worth a checkpoint.
        """
        given_up = self.given_up_in(window) if given_up is None else given_up
        self._handed_out -= len(window.refs)
        self._settling.settle(
            lambda: self._acknowledged(window.refs, given_up, step), window.own if self._ranks.frees else []
        )
        return given_up

    def _acknowledged(self, refs: Sequence[SampleRef], given_up: Sequence[GivenUp], step: int) -> None:
        """Acknowledge a window, on rank 0; in the thread of `Settling`, which keeps what goes wrong."""
        if self._queue is None:
            return
        left = {ref.sample_id: ref for ref in refs}
        with interruptible(self._check_stop):
            for item in given_up:
                self._patiently(self._queue.fail, [left.pop(item.sample_id)], item.reason, retryable=False)
            self._patiently(self._queue.ack, left.values(), step=step)

    def given_up_in(self, window: TrainingWindow) -> list[GivenUp]:
        """Return what any rank could not use of `window`, on every rank. A collective."""
        if not self._ranks.sum([float(len(window.given_up))])[0]:
            return []
        messages = self._ranks.gather(msgspec.json.encode(window.given_up))
        items = [item for message in messages for item in msgspec.json.decode(message, type=list[GivenUp])]
        return list({item.sample_id: item for item in items}.values())  # ranks that share a sample both name it

    @property
    def store_trouble(self) -> dict[str, int | float]:
        """Retries, damaged and lost samples and failed removals of this rank's store client so far."""
        counters = self._store.counters
        return {name: counters[name] for name in GET_TROUBLE}

    @property
    def in_flight(self) -> int:
        """References published whose window is not complete, for people: as last known; 0 where no channel is read."""
        if self._queue is not None:
            with contextlib.suppress(ChannelUnavailable), interruptible(_go_on_without):
                held = len(self._partial) + self._handed_out + sum(len(pending.refs) for pending in self._pending)
                self._last_in_flight = self._queue.depth() + held
        return self._last_in_flight

    def note(self, what: str) -> None:
        """Tell the producer what training does: it counts as progress."""
        if self._channel is not None:
            self._channel.note_progress(what)

    def finish(self, reason: str) -> int:
        """Tell the producer that training is done; return how many published samples were left untrained."""
        self.close()
        if self._channel is None:
            return 0
        with interruptible(self._check_stop):
            left = self._patiently(self._channel.in_flight_remote)
            self._patiently(self._channel.finish, reason)
        return left

    def abandon(self, reason: str, failure_class: FailureClass) -> None:
        """Tell the producer that training failed. Raises `Preempted` if it is away and a stop was asked for."""
        self.close()
        if self._channel is not None:
            with interruptible(self._check_stop):
                self._channel.abandon(reason, failure_class)
