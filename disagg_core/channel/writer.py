"""The writing side: one claimed producer, group commit, counts that survive restarts, and a terminal state.

Several threads may publish at once. Whoever gets to commit takes along everything that has gathered meanwhile, so that
one write and one fsync serve them all; nobody waits longer than for one commit before his own. `publish_many` returns
when its references are durable.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from disagg_core.channel.contract import Cursor, Framed, Tally
from disagg_core.channel.liveness import Heartbeat, IdleWatch, PeerStatus, PeerWatch
from disagg_core.channel.records import EndRecord, FailRecord, OpenRecord, RefRecord, encode_ref, frame, frame_ref
from disagg_core.channel.session import ChannelSession
from disagg_core.contracts import SCHEMA_VERSION, SampleRef, StreamTotals
from disagg_core.errors import ChannelClosed, ChannelDamaged, FailureClass, IdentityMismatch

logger = logging.getLogger(__name__)

LIVENESS_S = 0.25
"""How often a side that waits checks that the other one is alive."""


class _Batch:
    """What one call wants published, on its way through a group commit."""

    def __init__(self, refs: Sequence[SampleRef]) -> None:
        self.refs = refs
        self.encoded = [encode_ref(ref) for ref in refs]
        self.settled = False
        self.error: BaseException | None = None


class ReferenceWriter:
    """The producer's end of a channel. Claims the writing side with its first publication."""

    def __init__(self, session: ChannelSession) -> None:
        self._session = session
        self._backend = session.backend
        self._heartbeat: Heartbeat | None = None
        self._tally = Tally()
        self._appendable = False
        self._landed: set[str] = set()
        self._gathering = threading.Lock()
        self._waiting: list[_Batch] = []
        self._committing = threading.RLock()
        self._seen_cursor: Cursor | None = None
        self._peer = PeerWatch(session.lease_s, session.clock)
        self._idle = IdleWatch("reader", session.idle_timeout_s, session.clock)

    # --- publishing ---

    def claim(self) -> None:
        """Take the writing side and make the log appendable: repair its tail, resume its counts."""
        with self._committing:
            if self._heartbeat is None:
                self._heartbeat = self._session.claim("writer")
            self._heartbeat.check()
            if not self._appendable:
                self._recover(self._heartbeat)

    def _recover(self, heartbeat: Heartbeat) -> None:
        known = self._tally
        tally = self._backend.recover()
        cursor = self._backend.load_cursor()
        if cursor is not None and cursor.seq > tally.last.seq:
            raise ChannelDamaged(
                f"{self._backend.where}: the reader acknowledged record {cursor.seq}, but the stream ends at record "
                f"{tally.last.seq}: records that were written are gone; start a new attempt"
            )
        if tally.last.epoch > heartbeat.claim.epoch:
            raise ChannelDamaged(
                f"{self._backend.where}: the stream was written under claim {tally.last.epoch}, but the newest claim "
                f"is {heartbeat.claim.epoch}: claims were removed; start a new attempt"
            )
        if known.last.seq and tally.refs > known.refs:
            self._note_landed(known.refs)
        self._tally = tally
        if tally.end is None and tally.last.epoch < heartbeat.claim.epoch:
            self._append([self._opening(heartbeat)], heartbeat)
        self._appendable = True

    def _note_landed(self, known_refs: int) -> None:
        """Remember which references of a failed commit landed after all, so that a retry does not double them.

        Taken from the list of sample ids: the records themselves may be acknowledged, and forgotten, by now.
        """
        self._landed.update(self._backend.sample_ids(known_refs))

    def _opening(self, heartbeat: Heartbeat) -> Framed:
        record = OpenRecord(
            seq=self._tally.last.seq + 1,
            attempt=self._session.attempt,
            epoch=heartbeat.claim.epoch,
            run_id=self._session.run_id,
            host=heartbeat.claim.host,
            pid=heartbeat.claim.pid,
        )
        return Framed(record, frame(record))

    def publish_many(self, refs: Sequence[SampleRef]) -> None:
        """Append references in order; durable on return. See `StreamingRefChannel.publish_many`."""
        for ref in refs:
            self._check_ref(ref)
        if not refs:
            return
        batch = _Batch(refs)
        with self._gathering:
            self._waiting.append(batch)
        with self._committing:
            if not batch.settled:
                self._commit_gathered()
        if batch.error is not None:
            raise batch.error

    def _check_ref(self, ref: SampleRef) -> None:
        expected = (self._session.run_id, self._session.attempt, SCHEMA_VERSION)
        found = (ref.run_id, ref.attempt, ref.schema_version)
        if found != expected:
            raise IdentityMismatch(
                f"reference {ref.sample_id} is of (run, attempt, schema) {found}, expected {expected} on "
                f"{self._backend.where}"
            )

    def _commit_gathered(self) -> None:
        with self._gathering:
            group, self._waiting = self._waiting, []
        error: BaseException | None = None
        try:
            self._commit(group)
        except BaseException as failure:
            error = failure
            raise
        finally:  # whatever ended the commit: nobody whose batch it took may believe that his landed
            for batch in group:
                batch.settled, batch.error = True, error

    def _commit(self, group: list[_Batch]) -> None:
        self.claim()
        assert self._heartbeat is not None
        self._check_open()
        seq, epoch = self._tally.last.seq, self._heartbeat.claim.epoch
        framed: list[Framed] = []
        for batch in group:
            for ref, encoded in zip(batch.refs, batch.encoded, strict=True):
                if ref.sample_id in self._landed:
                    continue
                seq += 1
                record = RefRecord(seq=seq, attempt=ref.attempt, epoch=epoch, ref=ref)
                framed.append(Framed(record, frame_ref(encoded, seq=seq, attempt=ref.attempt, epoch=epoch)))
        if framed:
            self._append(framed, self._heartbeat)
            self._idle.stop_waiting()
        if self._landed:
            self._landed.difference_update(ref.sample_id for batch in group for ref in batch.refs)

    def _append(self, framed: list[Framed], heartbeat: Heartbeat) -> None:
        self._appendable = False  # until we know that all of it landed
        last = self._backend.append(framed, epoch=heartbeat.claim.epoch)
        self._appendable = True
        self._tally = self._tally.plus([item.record for item in framed], last)
        heartbeat.progressed(f"wrote record {last.seq} ({framed[-1].record.__struct_config__.tag})", self._tally.refs)

    def _check_open(self) -> None:
        if self._tally.end is not None:
            raise ChannelClosed(f"{self._backend.where} has its end already: {describe_end(self._tally.end)}")

    # --- terminal states ---

    def close(self, totals: StreamTotals) -> None:
        """Append the end-of-stream record. See `StreamingRefChannel.close`."""
        with self._committing:
            self.claim()
            if isinstance(self._tally.end, EndRecord) and self._tally.end.totals == totals:
                return
            self._check_open()
            if (totals.refs, totals.bytes) != (self._tally.refs, self._tally.bytes):
                raise ValueError(
                    f"totals say {totals.refs} references and {totals.bytes} bytes, but {self._tally.refs} references "
                    f"and {self._tally.bytes} bytes were published to {self._backend.where}"
                )
            self._end(EndRecord(**self._next(), totals=totals))

    def fail(self, reason: str, failure_class: FailureClass) -> None:
        """Append the failure record. See `StreamingRefChannel.fail`."""
        with self._committing:
            self.claim()
            self._check_open()
            self._end(FailRecord(**self._next(), reason=reason[:10_000], failure_class=failure_class))

    def _next(self) -> dict[str, int]:
        assert self._heartbeat is not None
        return {
            "seq": self._tally.last.seq + 1,
            "attempt": self._session.attempt,
            "epoch": self._heartbeat.claim.epoch,
        }

    def _end(self, record: EndRecord | FailRecord) -> None:
        assert self._heartbeat is not None
        self._append([Framed(record, frame(record))], self._heartbeat)
        logger.info("%s: %s", self._backend.where, describe_end(record))

    # --- counting ---

    @property
    def claimed(self) -> bool:
        """Whether this process writes the channel."""
        return self._heartbeat is not None

    def tally(self) -> Tally:
        """Return what is in the stream: from memory for the writer itself, from the backend for anybody else."""
        return self._tally if self._heartbeat is not None else self._backend.tally()

    def in_flight(self) -> tuple[int, int]:
        """Return references and bytes that were published and not acknowledged."""
        cursor = self._seen_cursor = self._backend.load_cursor()
        tally = self.tally()
        if cursor is None:
            return tally.refs, tally.bytes
        if cursor.refs > tally.refs:
            tally = self._backend.tally()
        refs, size = tally.refs - cursor.refs, tally.bytes - cursor.bytes
        if refs < 0 or size < 0:
            raise ChannelDamaged(
                f"{self._backend.where}: the reader acknowledged {cursor.refs} references of {cursor.bytes} bytes, but "
                f"only {tally.refs} of {tally.bytes} bytes were published; start a new attempt"
            )
        return refs, size

    def consumed(self) -> int:
        """Return how many references the reader acknowledged. `wait_for_reader_change` does not take it for a look."""
        cursor = self._backend.load_cursor()
        return 0 if cursor is None else cursor.refs

    # --- the reader, as seen from here ---

    def reader_status(self) -> PeerStatus:
        """Return the state of the reading side."""
        cursor = self._backend.load_cursor()
        claim = self._backend.read_claim("reader")
        if cursor is not None and cursor.state != "running":
            return PeerStatus("reader", cursor.state, cursor.reason, claim)
        return PeerStatus("reader", self._peer.state(claim), claim=claim)

    def wait_for_reader_change(self, timeout_s: float) -> PeerStatus:
        """Wait for an acknowledgement or for the reader's end. See `StreamingRefChannel.wait_for_reader_change`."""
        deadline = self._session.clock() + timeout_s
        while True:
            left = deadline - self._session.clock()
            self._backend.wait_for_reader(self._seen_cursor, max(0.0, min(LIVENESS_S, left)))
            status = self.reader_status()
            cursor = self._backend.load_cursor()
            if cursor != self._seen_cursor or not status.active:
                self._seen_cursor = cursor
                self._idle.stop_waiting()
                return status
            progress = None if status.claim is None else (status.claim.epoch, status.claim.progress)
            self._idle.check(progress, status.describe)
            if left <= 0:
                return status

    def note(self, text: str) -> None:
        """Put a note into the heartbeat; a new one counts as progress."""
        if self._heartbeat is not None:
            self._heartbeat.progressed(text, self._tally.refs)

    def disconnect(self) -> None:
        """Give the claim back."""
        if self._heartbeat is not None:
            self._heartbeat.release()
            self._heartbeat = None
            self._appendable = False


def describe_end(end: EndRecord | FailRecord) -> str:
    """Return one line about how a stream ended."""
    if isinstance(end, FailRecord):
        return f"the producer failed ({end.failure_class}): {end.reason}"
    totals = end.totals
    return (
        f"ended with {totals.refs} references of {totals.bytes} bytes, {totals.prompts} prompts taken, "
        f"{totals.rejected} rejected"
    )
