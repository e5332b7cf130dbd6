"""The reading side: one claimed consumer, delivery in published order, and a cursor that only goes forward.

Acknowledging is by position. References may be settled (trained, quarantined, dropped) in any order; the cursor moves
over the longest settled beginning of what was delivered.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec
from msgspec.structs import replace

from disagg_core.channel.contract import Cursor, Entry, Position
from disagg_core.channel.liveness import Heartbeat, IdleWatch, PeerStatus, PeerWatch
from disagg_core.channel.records import EndRecord, FailRecord, RefRecord
from disagg_core.channel.session import ChannelSession
from disagg_core.channel.staleness import Staleness
from disagg_core.channel.writer import LIVENESS_S, describe_end
from disagg_core.contracts import SampleRef
from disagg_core.errors import (
    ChannelClosed,
    ChannelDamaged,
    ChannelError,
    ChannelUnavailable,
    FailureClass,
    IdentityMismatch,
    ProducerFailed,
)

logger = logging.getLogger(__name__)

Settled = Literal["trained", "quarantined", "dropped"]
_STREAM_BATCH = 256
_READ_AT_ONCE = 1024
"""Records asked of the backend at a time, however many references are wanted."""


class _Delivered(msgspec.Struct, gc=False):
    """A reference that was handed out and is not yet behind the cursor."""

    after: Position
    size: int
    settled: Settled | None


class ReferenceReader:
    """The consumer's end of a channel. Claims the reading side with its first poll."""

    def __init__(self, session: ChannelSession, staleness: Staleness) -> None:
        self._session = session
        self._backend = session.backend
        self._staleness = staleness
        self._heartbeat: Heartbeat | None = None
        self._lock = threading.RLock()
        self._storing = threading.Lock()
        """Is held by who writes the cursor; taken before `_lock`, which nobody holds while the cursor is written."""
        self._position = Position()
        self._cursor = Cursor(run_id=session.run_id, attempt=session.attempt, epoch=0)
        self._delivered: dict[str, _Delivered] = {}
        self._unanswered: set[str] = set()
        """What was acknowledged in vain so far: that is tried again, and may be behind the cursor by then."""
        self._refs = 0
        self._bytes = 0
        self._end: EndRecord | FailRecord | None = None
        self._peer = PeerWatch(session.lease_s, session.clock)
        self._idle = IdleWatch("writer", session.idle_timeout_s, session.clock)

    @property
    def claimed(self) -> bool:
        """Whether this process reads the channel."""
        return self._heartbeat is not None

    @property
    def end(self) -> EndRecord | FailRecord | None:
        """The stream's last record, once this reader has read it."""
        return self._end

    @property
    def delivered(self) -> int:
        """References delivered and settled so far, those of earlier readers of this attempt included."""
        return self._refs

    def claim(self) -> Heartbeat:
        """Take the reading side and start behind what is acknowledged.

        Raises:
            ChannelBusy: there is a live reader.
            ChannelClosed: the reader is in a terminal state already.
        """
        with self._lock:
            if self._heartbeat is None:
                heartbeat = self._session.claim("reader")
                try:
                    self._start(heartbeat)
                except ChannelError:
                    heartbeat.release()
                    raise
                self._heartbeat = heartbeat
            self._heartbeat.check()
            return self._heartbeat

    def _start(self, heartbeat: Heartbeat) -> None:
        self._cursor = self._backend.load_cursor() or self._cursor
        self._check_running()
        self._cursor = replace(self._cursor, epoch=heartbeat.claim.epoch)
        self._position = self._cursor.position
        self._refs, self._bytes = self._cursor.refs, self._cursor.bytes
        self._delivered.clear()
        self._unanswered.clear()
        self._end = None

    # --- delivery ---

    def poll(self, max_n: int | None = None) -> list[SampleRef]:
        """Return the new references at once, or up to `max_n` of them. See `StreamingRefChannel.poll`."""
        if max_n is not None and max_n < 1:
            raise ValueError(f"expected to be asked for at least 1 reference, found {max_n}")
        with self._lock:
            heartbeat = self.claim()
            refs = self._read_new(max_n)
            if refs:
                self._idle.stop_waiting()
                heartbeat.progressed(f"took record {self._position.seq}", self._refs)
            elif isinstance(self._end, FailRecord):
                raise ProducerFailed(self._end.reason, self._end.failure_class)
            elif self._end is None:
                self._check_writer()
        self._store_dropped(refs)
        return refs

    def _store_dropped(self, refs: list[SampleRef]) -> None:
        """Move the cursor over what was dropped; who acknowledges meanwhile leaves that to the next poll, if any comes.

        It is left to him who has to acknowledge again: a poll does not wait for what he waits for.
        """
        if not self._staleness.dropped or not self._storing.acquire(blocking=self._end is not None):
            return
        try:
            if not self._unanswered:
                self._store_if_moved()
        except ChannelUnavailable:
            if not refs:
                raise  # with references in hand the cursor can wait for the next call; they would not come again
        finally:
            self._storing.release()

    def _read_new(self, max_n: int | None) -> list[SampleRef]:
        """Read and accept what is new, up to `max_n` references, in bounded reads."""
        refs: list[SampleRef] = []
        while self._end is None and (max_n is None or len(refs) < max_n):
            wanted = _READ_AT_ONCE if max_n is None else min(_READ_AT_ONCE, max_n - len(refs))
            try:
                entries = self._backend.read(self._position, wanted)
            except ChannelError:
                if refs:
                    break  # they are accepted and would not come again; the next call meets the error
                raise
            if not self._take(entries, refs) or len(entries) < wanted:
                break
        return refs

    def _take(self, entries: list[Entry], refs: list[SampleRef]) -> bool:
        """Accept entries in order; return False at one that is refused, raising if nothing precedes it."""
        for entry in entries:
            record = entry.record
            try:
                if type(record) is RefRecord:
                    self._accept(record.ref, entry.after, refs)
                elif isinstance(record, (EndRecord, FailRecord)):
                    self._note_end(record)
            except (IdentityMismatch, ChannelDamaged):
                if refs:
                    return False
                raise
            self._position = entry.after
        return True

    def _accept(self, ref: SampleRef, after: Position, refs: list[SampleRef]) -> None:
        if ref.key in self._delivered:
            raise ChannelDamaged(
                f"{self._backend.where}: record {after.seq} repeats the key {ref.key!r} of record "
                f"{self._delivered[ref.key].after.seq}; a key is fresh for every stored sample"
            )
        self._staleness.refuse(ref)
        dropped = self._staleness.drop(ref)
        self._delivered[ref.key] = _Delivered(after, ref.size_bytes, "dropped" if dropped else None)
        self._refs += 1
        self._bytes += ref.size_bytes
        if not dropped:
            refs.append(ref)

    def _note_end(self, end: EndRecord | FailRecord) -> None:
        if isinstance(end, EndRecord) and (end.totals.refs, end.totals.bytes) != (self._refs, self._bytes):
            raise ChannelDamaged(
                f"{self._backend.where}: the end-of-stream record says {end.totals.refs} references of "
                f"{end.totals.bytes} bytes, but {self._refs} of {self._bytes} bytes were read; start a new attempt"
            )
        self._end = end

    def wait(self, timeout_s: float) -> None:
        """Return when there may be something to poll, or after `timeout_s` seconds."""
        self._backend.wait_for_records(self._position, min(timeout_s, LIVENESS_S))

    def stream(self) -> Iterator[SampleRef]:
        """Yield references until the end of the stream. See `StreamingRefChannel.stream`."""
        while True:
            refs = self.poll(_STREAM_BATCH)
            yield from refs
            if self._end is not None and not refs:
                return
            if not refs:
                self.wait(LIVENESS_S)

    # --- acknowledgement ---

    def settle(self, refs: Iterable[SampleRef], how: Settled, step: int | None) -> None:
        """Mark references as done with, and move the cursor. See `StreamingRefChannel.ack`."""
        with self._storing:
            keys = [ref.key for ref in refs]
            with self._lock:
                self.claim()
                self._check_running()
                self._mark(keys, how)
                if step is not None:
                    self._cursor = replace(self._cursor, step=max(step, self._cursor.step or 0))
            self._unanswered.update(keys)
            self._store_if_moved()
            self._unanswered.difference_update(keys)

    def _mark(self, keys: list[str], how: Settled) -> None:
        unknown = [key for key in keys if key not in self._delivered and key not in self._unanswered]
        if unknown:
            raise ChannelClosed(
                f"{len(unknown)} references were acknowledged that {self._backend.where} never delivered, or that "
                f"were acknowledged before: {', '.join(unknown[:3])}"
            )
        for key in keys:
            if key in self._delivered:
                self._delivered[key].settled = how

    def _store_if_moved(self) -> None:
        """Write the cursor if the settled beginning has grown. Nothing is forgotten before it is written."""
        with self._lock:
            done, cursor = self._moved()
        if not done:
            return
        self._store(cursor)
        with self._lock:
            for key in done:
                del self._delivered[key]

    def _moved(self) -> tuple[list[str], Cursor]:
        """Return the keys of the settled beginning of what was delivered, and the cursor behind it."""
        done: list[str] = []
        moved = {"refs": 0, "bytes": 0, "quarantined": 0, "dropped": 0}
        after = self._cursor.position
        for key, item in self._delivered.items():
            if item.settled is None:
                break
            done.append(key)
            after = item.after
            moved["refs"] += 1
            moved["bytes"] += item.size
            if item.settled != "trained":
                moved[item.settled] += 1
        sums = {name: getattr(self._cursor, name) + more for name, more in moved.items()}
        return done, replace(self._cursor, seq=after.seq, offset=after.offset, log_epoch=after.epoch, **sums)

    def _store(self, cursor: Cursor) -> None:
        heartbeat = self.claim()
        cursor = replace(cursor, heartbeat=time.time())
        self._backend.store_cursor(cursor)
        self._cursor = cursor
        heartbeat.progressed(f"acknowledged record {cursor.seq} ({cursor.refs} references)", self._refs)

    def finish(self, state: Literal["done", "failed"], reason: str, failure_class: FailureClass | None) -> None:
        """Enter a terminal state of the reader. See `StreamingRefChannel.finish` and `abandon`."""
        with self._storing:
            with self._lock:
                self.claim()
                self._check_running()
                _, cursor = self._moved()
            self._store(replace(cursor, state=state, reason=reason[:10_000], failure_class=failure_class))
            logger.info("%s: the reader is %s: %s", self._backend.where, state, reason)

    def _check_running(self) -> None:
        if self._cursor.state != "running":
            raise ChannelClosed(f"the reader of {self._backend.where} is {self._cursor.state}: {self._cursor.reason}")

    # --- the writer, as seen from here ---

    def writer_status(self) -> PeerStatus:
        """Return the state of the writing side."""
        claim = self._backend.read_claim("writer")
        end = self._end or self._backend.tally().end
        if end is not None:
            state: Literal["ended", "failed"] = "ended" if isinstance(end, EndRecord) else "failed"
            return PeerStatus("writer", state, describe_end(end), claim)
        return PeerStatus("writer", self._peer.state(claim), claim=claim)

    def check_not_failed(self) -> None:
        """Raise `ProducerFailed` if that is how the stream ends, read or not."""
        end = self._end or self._backend.tally().end
        if isinstance(end, FailRecord):
            raise ProducerFailed(end.reason, end.failure_class)

    def _check_writer(self) -> None:
        claim = self._backend.read_claim("writer")
        token = (self._position.seq, None if claim is None else (claim.epoch, claim.progress))
        self._idle.check(token, lambda: PeerStatus("writer", self._peer.state(claim), claim=claim).describe())

    def note(self, text: str) -> None:
        """Put a note into the heartbeat; a new one counts as progress."""
        if self._heartbeat is not None:
            self._heartbeat.progressed(text, self._refs)

    def disconnect(self) -> None:
        """Give the claim back."""
        with self._storing, self._lock:
            if self._heartbeat is not None:
                self._heartbeat.release()
                self._heartbeat = None
