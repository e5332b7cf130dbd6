"""Reading the file backend's log: bounded chunks, complete lines only, and damage told from what is not yet written.

Three things may stand where the next record is expected. A line without its newline is still being written, or was
torn by a crash: it is waited for, and removed by the next writer. A line with NUL bytes is a hole, as seen over a
network mount or after a power cut: it is waited for as well, unless an intact record has stood behind it for a while.
Anything else that is not the next record is damage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from disagg_core.channel.contract import Entry, Position
from disagg_core.channel.records import (
    MAX_FRAME,
    BadFrame,
    EndRecord,
    FailRecord,
    OpenRecord,
    Record,
    RefRecord,
    decode_record,
)
from disagg_core.errors import ChannelDamaged, ForeignChannel

CHUNK = 256 * 1024
"""Bytes read at a time: the most that is held besides what a caller asked for (and a single longer record)."""

SETTLE_S = 5.0
"""How long a hole with an intact record behind it may last before it is damage."""

WAY_OUT = "the stream cannot be trusted from here on: keep the file for inspection and start a new attempt"


class LogReader:
    """Reads the records behind a position of one log file, in order, each exactly once."""

    def __init__(
        self,
        path: Path,
        *,
        run_id: str,
        attempt: int,
        position: Position,
        reopen: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.position = position
        self.seen_size = 0
        self._run_id = run_id
        self._attempt = attempt
        self._reopen = reopen
        self._clock = clock
        self._descriptor: int | None = None
        self._lines: list[bytes] = []
        self._next = 0
        self._hole_since: float | None = None

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def read(self, max_records: int) -> list[Entry]:
        """Return up to `max_records` next records; an empty list when nothing more is complete.

        Raises:
            ChannelDamaged: the next line is not the next record; file, offset, expected and found are named. What
                came before it was returned by earlier calls.
            ForeignChannel: the log belongs to another run or attempt.
        """
        entries: list[Entry] = []
        while len(entries) < max_records:
            self._take_expected(entries, max_records)
            if len(entries) == max_records:
                break
            fresh = self._next == len(self._lines)
            if fresh and not self._fill():
                break
            line = self._lines[self._next]
            try:
                record = decode_record(line)
                if record.epoch < self.position.epoch:
                    self._pass_over(line)
                    continue
                self._check(record)
            except (BadFrame, ForeignChannel) as error:
                if entries or not fresh:
                    self._forget()  # give what is intact first; look at the file again before judging
                    if entries:
                        break
                    continue
                if isinstance(error, ForeignChannel) or not self._is_hole(line):
                    raise self._damage(error) from error
                self._forget()
                break
            self._hole_since = None
            self._next += 1
            self.position = Position(record.seq, self.position.offset + len(line) + 1, record.epoch)
            entries.append(Entry(record, self.position))
            if isinstance(record, (EndRecord, FailRecord)):
                break
        return entries

    def _take_expected(self, entries: list[Entry], max_records: int) -> None:
        """Take lines while each is the very reference that is expected: the fast way through nearly every line."""
        lines, place = self._lines, self._next
        seq, offset, epoch = self.position.seq, self.position.offset, self.position.epoch
        last = min(len(lines), place + max_records - len(entries))
        while place < last:
            line = lines[place]
            try:
                record = decode_record(line)
            except BadFrame:
                break
            if (
                type(record) is not RefRecord
                or record.seq != seq + 1
                or record.epoch != epoch
                or record.attempt != self._attempt
                or record.ref.run_id != self._run_id
            ):
                break
            seq += 1
            offset += len(line) + 1
            place += 1
            entries.append(Entry(record, Position(seq, offset, epoch)))
        if place != self._next:
            self._next, self.position, self._hole_since = place, entries[-1].after, None

    def close(self) -> None:
        """Close the file."""
        self._forget()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _fill(self) -> bool:
        """Read the next chunk of complete lines; return False when there is none."""
        if self._reopen and self._descriptor is not None:
            os.close(self._descriptor)  # a network mount shows new bytes to a new descriptor
            self._descriptor = None
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                if self.position.offset:
                    raise ChannelDamaged(
                        f"{self.path} is gone: expected {self.position.offset} bytes or more; {WAY_OUT}"
                    ) from None
                return False
        size = CHUNK
        while True:
            data = os.pread(self._descriptor, size, self.position.offset)
            complete = data.rfind(b"\n") + 1
            if complete or len(data) < size:
                break
            if size > MAX_FRAME:
                raise self._damage(BadFrame(f"a line of at most {MAX_FRAME} bytes", "no newline in that many"))
            size *= 2
        # With the torn tail, which was looked at too: whoever waits for records waits for another size than this.
        self.seen_size = self.position.offset + len(data)
        if not data and self.position.offset:
            self._check_not_shorter()  # a file cut behind our back reads as empty, just like one with nothing new
        # A torn tail is not kept until its rest comes: the next writer cuts it off and writes something else there.
        self._lines = data[:complete].split(b"\n")[:-1]
        self._next = 0
        return bool(self._lines)

    def _check_not_shorter(self) -> None:
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        if size < self.position.offset:
            raise ChannelDamaged(
                f"{self.path} became shorter: expected {self.position.offset} bytes or more, found {size}; {WAY_OUT}"
            )

    def _check(self, record: Record) -> None:
        run_id = self._run_id
        if isinstance(record, RefRecord):
            run_id = record.ref.run_id
        elif isinstance(record, OpenRecord):
            run_id = record.run_id
        if record.attempt != self._attempt or run_id != self._run_id:
            raise ForeignChannel(
                f"{self.path} belongs to attempt {record.attempt} of run {run_id!r}, expected attempt "
                f"{self._attempt} of run {self._run_id!r}; give each attempt its own directory"
            )
        if record.seq != self.position.seq + 1:
            raise BadFrame(f"record {self.position.seq + 1}", f"record {record.seq}")

    def _pass_over(self, line: bytes) -> None:
        """Skip a record that a fenced writer appended after its successor had begun."""
        self._next += 1
        at = self.position
        self.position = Position(at.seq, at.offset + len(line) + 1, at.epoch)

    def _is_hole(self, line: bytes) -> bool:
        if b"\0" not in line:
            return False
        if not any(is_intact(later) for later in self._lines[self._next + 1 :]):
            return True
        # Over a network mount the pages of one append may arrive out of order, so an intact record behind a hole does
        # not yet prove that the hole will stay.
        now = self._clock()
        if self._hole_since is None:
            self._hole_since = now
        return now - self._hole_since < SETTLE_S

    def _damage(self, error: BadFrame | ForeignChannel) -> ChannelDamaged | ForeignChannel:
        self._forget()
        if isinstance(error, ForeignChannel):
            return error
        return ChannelDamaged(
            f"{self.path} is damaged at offset {self.position.offset}, where record {self.position.seq + 1} should be: "
            f"{error}; {WAY_OUT}"
        )

    def _forget(self) -> None:
        self._lines, self._next = [], 0


def is_intact(line: bytes) -> bool:
    """Return whether a line is a whole record of any stream."""
    try:
        decode_record(line)
    except BadFrame:
        return False
    return True
