"""`StreamingRefChannel`: the one door to a reference channel, whichever backend its address names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

from pydantic import SecretStr

from disagg_core.channel.backends import open_backend
from disagg_core.channel.contract import ChannelBackend
from disagg_core.channel.liveness import LEASE_S, PeerStatus, ProcessIdentity
from disagg_core.channel.reader import ReferenceReader
from disagg_core.channel.records import EndRecord
from disagg_core.channel.session import ChannelSession
from disagg_core.channel.staleness import Staleness
from disagg_core.channel.writer import ReferenceWriter
from disagg_core.contracts import RunIdentity, SampleRef, StreamTotals
from disagg_core.errors import FailureClass

DEFAULT_IDLE_TIMEOUT_S = 600.0


class StreamingRefChannel:
    """An append-only, tensor-free stream of sample references from one producer to one consumer.

    `url` is a directory (a path, or ``file:/dir``) or ``redis://host:port/db`` (``rediss://`` with TLS); on a server
    the channel's name is ``<run_id>/<attempt>`` unless the address ends in ``?channel=<name>``. Connecting claims
    nothing: the first publication claims the writing side, the first `poll` or `ack` the reading side. Usable as a
    context manager; leaving it disconnects, which does *not* end the stream.

    Staleness (off by default): with `identity` every reference must have been captured by that target, tokenizer and
    vocabulary map; with `max_draft_lag` references captured for a draft more than so many versions older than
    `draft_version()` are dropped: counted in `dropped`, handed to `on_drop` to be freed, never delivered.

    All methods raise `ChannelUnavailable` (transient: try the same call again; nothing is doubled) when the mount or
    the server does not answer, `ChannelDamaged`, `ForeignChannel`, and `ChannelBusy` when the side is, or was taken
    over by, another process.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        run_id: str = "local",
        attempt: int = 1,
        idle_timeout_s: float = DEFAULT_IDLE_TIMEOUT_S,
        password: SecretStr | None = None,
        ca: Path | None = None,
        identity: RunIdentity | None = None,
        max_draft_lag: int | None = None,
        draft_version: Callable[[], int] | None = None,
        on_drop: Callable[[SampleRef], None] | None = None,
        lease_s: float = LEASE_S,
        clock: Callable[[], float] = time.monotonic,
        process: ProcessIdentity | None = None,
        backend: ChannelBackend | None = None,
    ) -> None:
        self._backend = backend or open_backend(url, run_id=run_id, attempt=attempt, password=password, ca=ca)
        self._staleness = Staleness(identity, max_draft_lag, draft_version, on_drop)
        session = ChannelSession(
            self._backend,
            run_id,
            attempt,
            idle_timeout_s,
            lease_s,
            clock,
            process or ProcessIdentity.mine(),
        )
        self._writer = ReferenceWriter(session)
        self._reader = ReferenceReader(session, self._staleness)

    def __enter__(self) -> StreamingRefChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.disconnect()

    @property
    def where(self) -> str:
        """The channel's address, without secrets."""
        return self._backend.where

    # --- writer ---

    def claim_writer(self) -> None:
        """Become the writer now: repair a torn tail and resume the counts. `ChannelBusy` if there is a live one."""
        self._writer.claim()

    def publish(self, ref: SampleRef) -> None:
        """Publish one reference; see `publish_many`, which is much cheaper for several."""
        self._writer.publish_many([ref])

    def publish_many(self, refs: Sequence[SampleRef]) -> None:
        """Publish references, in order, with one write and one fsync; they are durable on return.

        After `ChannelUnavailable` some may have landed: publish the same references again, none is doubled.

        Raises:
            ChannelClosed: the stream has its end.
            IdentityMismatch: a reference of another run, attempt or schema.
            TypeError: a reference holds a tensor or a value of the wrong type. Nothing was published.
        """
        self._writer.publish_many(refs)

    def close(self, totals: StreamTotals) -> None:
        """End the stream. `totals` covers the whole attempt, producers before a restart included.

        Raises:
            ValueError: `totals` does not say what was published.
            ChannelClosed: the stream has another end already.
        """
        self._writer.close(totals)

    def fail(self, reason: str, failure_class: FailureClass = "bug") -> None:
        """End the stream with a failure, which the reader gets as `ProducerFailed` after the last reference."""
        self._writer.fail(reason, failure_class)

    @property
    def published(self) -> int:
        """References published in this attempt, those of earlier producer processes included."""
        return self._writer.tally().refs

    @property
    def published_bytes(self) -> int:
        """Sum of the published references' `size_bytes`."""
        return self._writer.tally().bytes

    def published_sample_ids(self) -> Iterator[str]:
        """Iterate over the sample ids in the stream, in order: what a restarted producer has to leave out."""
        return self._backend.sample_ids()

    def consumed_remote(self) -> int:
        """References that the reader acknowledged in this attempt, from what the cursor says.

        Quarantined and dropped references are among them. The same from either side and right after a restart of
        either; it never goes back.
        """
        return self._writer.consumed()

    def in_flight_remote(self) -> int:
        """References published and not acknowledged (`published` - `consumed_remote`), from stream and cursor."""
        return self._writer.in_flight()[0]

    def in_flight_bytes_remote(self) -> int:
        """Bytes published and not acknowledged."""
        return self._writer.in_flight()[1]

    def reader_status(self) -> PeerStatus:
        """Return the state of the reader: `absent`, `running`, `released`, `lost`, `done` or `failed`."""
        return self._writer.reader_status()

    def wait_for_reader_change(self, timeout: float) -> PeerStatus:
        """Wait until the reader acknowledged more than at the last look (`in_flight_remote`) or is gone.

        Returns the reader's status, after `timeout` seconds in any case. A status that is not `active` means that no
        space will come: stop, and say so.

        Raises:
            ChannelStalled: the reader made no progress for the idle timeout.
        """
        return self._writer.wait_for_reader_change(timeout)

    # --- reader ---

    def claim_reader(self) -> None:
        """Become the reader now, behind what is acknowledged. `ChannelBusy` if there is a live one."""
        self._reader.claim()

    def poll(self, max_n: int | None = None) -> list[SampleRef]:
        """Return the new references without waiting, in published order, each once.

        Without `max_n` all that is published comes at once: with a producer held to its watermarks, no more than those
        allow. References read before something goes wrong are returned; the next call raises.

        Raises:
            ValueError: `max_n` is less than 1.
            ProducerFailed: everything before the failure was delivered.
            ChannelStalled: nothing has come for the idle timeout, and the writer made no progress either.
            IdentityMismatch: the next reference is not of this run's target (see `refused`).
        """
        return self._reader.poll(max_n)

    def wait(self, timeout: float) -> None:
        """Return when there may be something to `poll`; after a quarter of a second, or `timeout`, in any case."""
        self._reader.wait(timeout)

    def stream(self) -> Iterator[SampleRef]:
        """Yield references as they come, until the end of the stream. Raises as `poll` does."""
        return self._reader.stream()

    def ack(self, refs: Iterable[SampleRef], *, step: int | None = None) -> None:
        """Acknowledge references after the optimizer step `step`; durable on return.

        The cursor moves over the longest beginning of the stream that is settled, and never back.

        Raises:
            ChannelClosed: a reference was never delivered, or was acknowledged before.
        """
        self._reader.settle(refs, "trained", step)

    def quarantine(self, refs: Iterable[SampleRef]) -> None:
        """Acknowledge references that cannot be trained on; they are counted apart."""
        self._reader.settle(refs, "quarantined", None)

    def is_closed(self) -> bool:
        """Whether the stream has ended: for the reader, whether it has read the end-of-stream record."""
        return self.totals is not None

    @property
    def totals(self) -> StreamTotals | None:
        """What the end-of-stream record says; None while there is none (read)."""
        end = self._reader.end if self._reader.claimed else self._writer.tally().end
        return end.totals if isinstance(end, EndRecord) else None

    def finish(self, reason: str) -> None:
        """Say that the reader is done, for example at its last step: a waiting producer stops."""
        self._reader.finish("done", reason, None)

    def abandon(self, reason: str, failure_class: FailureClass = "bug") -> None:
        """Say that the reader failed: a waiting producer stops."""
        self._reader.finish("failed", reason, failure_class)

    def writer_status(self) -> PeerStatus:
        """Return the state of the writer: `absent`, `running`, `released`, `lost`, `ended` or `failed`."""
        return self._reader.writer_status()

    def check_not_failed(self) -> None:
        """Raise `ProducerFailed`, with its class, if the stream ends with a failure; takes nothing from it."""
        self._reader.check_not_failed()

    @property
    def delivered(self) -> int:
        """References delivered so far, those acknowledged by an earlier reader of the attempt included."""
        return self._reader.delivered

    def expect(self, identity: RunIdentity) -> None:
        """Refuse, from now on, references that `identity` did not capture: for readers that learn it after opening."""
        self._staleness.identity = identity

    @property
    def dropped(self) -> list[SampleRef]:
        """References left out because their draft was too old."""
        return self._staleness.dropped

    @property
    def refused(self) -> int:
        """How often a reference of another target was refused."""
        return self._staleness.refused

    # --- both ---

    def note_progress(self, text: str) -> None:
        """Say what this side is doing; it travels with the heartbeat and counts as progress."""
        self._writer.note(text)
        self._reader.note(text)

    def disconnect(self) -> None:
        """Give the claims back and close files and connections. The stream stays as it is."""
        self._writer.disconnect()
        self._reader.disconnect()
        self._backend.close()
