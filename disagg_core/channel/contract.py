"""The contract of the reference channel: what a backend must guarantee, and the plain records that cross the seam.

The channel is an append-only log with one writer and one reader, a cursor that the reader replaces, and a claim on
each side. Everything that is *policy* (counting, acknowledging, liveness, staleness) is written once, above this
seam, in `writer`, `reader` and `channel`. A backend is only asked for what depends on where the bytes lie.

Three things make the channel unable to lie:

- Every record carries its sequence number, the attempt and the epoch of the claim it was written under, and a
  checksum. A reader accepts exactly the next number. A gap, a repetition or a broken checksum is an error with a place.
- A claim is taken by compare-and-swap on its epoch. A process that lost its claim while it slept is *fenced*: its
  heartbeat tells it so, and what it may still have appended carries an older epoch and is passed over.
- The end of a stream is a record in the stream. Nothing else ends one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import msgspec

from disagg_core.channel.records import EndRecord, FailRecord, Record, RefRecord
from disagg_core.errors import FailureClass

Side = Literal["writer", "reader"]
ReaderState = Literal["running", "done", "failed"]
PeerState = Literal["absent", "running", "released", "lost", "ended", "done", "failed"]

SIDE_NAMES: dict[Side, str] = {"writer": "the producer (writer)", "reader": "the consumer (reader)"}
"""What the two sides are called in messages."""


class Position(msgspec.Struct, frozen=True, gc=False):
    """A place in the stream: after record `seq`, at byte `offset` of the file (0 where there are no files).

    `epoch` is the newest writer's claim seen up to there; records of an older one that follow are passed over.
    """

    seq: int = 0
    offset: int = 0
    epoch: int = 0


class Framed(msgspec.Struct, frozen=True, gc=False):
    """One record on its way into the log, with its encoded line."""

    record: Record
    line: bytes


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One intact record as read from the log, with the position right after it."""

    record: Record
    after: Position


class Tally(NamedTuple):
    """What the log holds since its beginning: the last record, counts of references, and its end if it has one."""

    last: Position = Position()
    refs: int = 0
    bytes: int = 0
    end: EndRecord | FailRecord | None = None

    def plus(self, records: Sequence[Record], last: Position) -> Tally:
        """Return the tally after more records, which end at `last`."""
        sizes = [record.ref.size_bytes for record in records if isinstance(record, RefRecord)]
        end = records[-1] if isinstance(records[-1], (EndRecord, FailRecord)) else None
        return Tally(last, self.refs + len(sizes), self.bytes + sum(sizes), end)


class Cursor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the reader is: everything up to `seq` is trained, quarantined or dropped, and safe to forget.

    `refs` and `bytes` are the references acknowledged and the sum of their sizes; `step` is the optimizer step that
    acknowledged last; `quarantined` and `dropped` are the references among them that were not trained.
    """

    run_id: str
    attempt: int
    epoch: int
    seq: int = 0
    offset: int = 0
    log_epoch: int = 0
    refs: int = 0
    bytes: int = 0
    step: int | None = None
    quarantined: int = 0
    dropped: int = 0
    state: ReaderState = "running"
    reason: str = ""
    failure_class: FailureClass | None = None
    heartbeat: float = 0.0

    @property
    def position(self) -> Position:
        """The place in the stream behind what is acknowledged."""
        return Position(self.seq, self.offset, self.log_epoch)


class ClaimStatus(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who holds one side of the channel, that it is alive (`beat`), and what it has done (`progress`, `did`).

    `beat` grows with each heartbeat and says only that the process runs. `progress` grows when something was
    accomplished: a record published, a reference delivered or acknowledged, a note. Times are wall clock seconds, for
    people; nothing is decided by comparing the clocks of two hosts.
    """

    run_id: str
    attempt: int
    epoch: int
    host: str
    boot: str
    pid_space: str
    pid: int
    started: int
    token: str
    beat: int = 0
    beat_at: float = 0.0
    progress: int = 0
    did: str = ""
    did_at: float = 0.0
    count: int = 0
    released: bool = False

    @property
    def holder(self) -> str:
        """The claim's process, for messages."""
        return f"pid {self.pid} on {self.host} (claim {self.epoch})"


class ClaimStore(Protocol):
    """Where the claims lie. `swap_claim` is the only way in, and is atomic between hosts."""

    def read_claim(self, side: Side) -> ClaimStatus | None:
        """Return the newest claim of `side`, released or not; None if there never was one."""

    def swap_claim(self, side: Side, status: ClaimStatus) -> bool:
        """Install `status` if the newest epoch is exactly ``status.epoch - 1``; return whether it was."""

    def beat(self, side: Side, status: ClaimStatus) -> bool:
        """Replace the claim of ``status.epoch``; return False, changing nothing, if a newer epoch exists."""


class ChannelBackend(ClaimStore, Protocol):
    """Where a channel's bytes lie.

    Methods raise `ChannelUnavailable` when the server or the mount does not answer (after the backend's own bounded
    retries), `ChannelDamaged` when what is there is not what was written, and `ForeignChannel` when it belongs to
    another run or attempt. None of them changes anything on the caller's side when it raises.
    """

    @property
    def where(self) -> str:
        """The channel's address without secrets, for messages."""

    def check_owner(self) -> None:
        """Raise `ForeignChannel` if log or cursor are another run's or attempt's. Costs nothing that grows."""

    def recover(self) -> Tally:
        """Make the log appendable: repair a torn tail, and return what is there. Called by the claimed writer only.

        What was never completely written is removed. A damaged record with an intact one behind it is not a torn
        tail: `ChannelDamaged`.
        """

    def append(self, batch: Sequence[Framed], *, epoch: int) -> Position:
        """Add the batch in order, durably, and return the position behind it.

        A reader never sees a part of a record. After `ChannelUnavailable` any prefix of the batch may have landed;
        `recover` tells. Raises `ChannelBusy` when a newer writer holds the claim.
        """

    def tally(self) -> Tally:
        """Return what the log holds at present, claiming and changing nothing. Costs at most what is new."""

    def sample_ids(self, skip: int = 0) -> Iterator[str]:
        """Return the sample ids of every reference ever published to this channel, in order, but the first `skip`."""

    def read(self, position: Position, max_records: int) -> list[Entry]:
        """Return up to `max_records` intact records behind `position`; an empty list when there is nothing yet.

        Never returns or skips a record that is incomplete or damaged: what lies before it is returned first, and the
        next call raises. Holds no more than one bounded chunk besides what it returns.
        """

    def load_cursor(self) -> Cursor | None:
        """Return the reader's cursor; None before the first acknowledgement."""

    def store_cursor(self, cursor: Cursor) -> None:
        """Replace the cursor durably and atomically, and let go of what lies before it where that saves space.

        Raises `ChannelBusy` when a newer reader holds the claim.
        """

    def wait_for_records(self, position: Position, timeout_s: float) -> None:
        """Return when there may be a record behind `position`, or after `timeout_s` seconds."""

    def wait_for_reader(self, seen: Cursor | None, timeout_s: float) -> None:
        """Return when the cursor may differ from `seen`, or after `timeout_s` seconds."""

    def close(self) -> None:
        """Let go of files and connections. The channel itself stays."""
