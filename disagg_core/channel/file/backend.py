"""The file backend: a directory on a mount that both sides share.

::

    refs.jsonl          the log, appended to by the claimed writer
    cursor.json         the reader's cursor, replaced atomically
    writer-<n>.json     claims and heartbeats, see `file_claims`
    reader-<n>.json
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from disagg_core.channel.contract import ClaimStatus, Cursor, Entry, Framed, Position, Side, Tally
from disagg_core.channel.file.claims import FileClaims
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.channel.file.log import WAY_OUT, LogReader, is_intact
from disagg_core.channel.file.mount import is_local_mount
from disagg_core.channel.records import RefRecord, decode_document, frame
from disagg_core.errors import ChannelBusy, ChannelDamaged, ChannelUnavailable, ForeignChannel
from disagg_core.processes.interrupt import check_interrupt
from disagg_core.processes.retry import Retry, wait_until

_SCAN = 1024
_RETRY_S = 1.0
"""How long an operation is tried again before the channel counts as away, which callers wait out for longer."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2
_T = TypeVar("_T")
_FIRST_LOOK_S = 0.001
_LONGEST_LOOK_S = {"local": 0.002, "remote": 0.020}
"""Pauses between two looks at the directory: 1 ms, then up to 2 ms on a local mount, where a look costs microseconds,
and up to 20 ms on a network mount, where it may be a request to a server."""


class FileBackend:
    """A `ChannelBackend` on files."""

    def __init__(
        self,
        directory: Path,
        *,
        run_id: str,
        attempt: int,
        files: FileSystem | None = None,
        local: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.where = f"file:{directory}"
        self._directory = directory
        self._log = directory / "refs.jsonl"
        self._cursor = directory / "cursor.json"
        self._run_id = run_id
        self._attempt = attempt
        self._files = files or FileSystem()
        self._local = is_local_mount(directory) if local is None else local
        self._clock = clock
        self._claims = FileClaims(directory, self._files)
        self._reader = self._open_log(Position())
        self._scanner = self._open_log(Position())
        self._tally = Tally()
        self._writing: int | None = None
        self._scanning = threading.RLock()  # the writer and whoever asks for totals share the scanner

    # --- claims ---

    def read_claim(self, side: Side) -> ClaimStatus | None:
        """See `ClaimStore`."""
        return self._call(lambda: self._claims.read_claim(side))

    def swap_claim(self, side: Side, status: ClaimStatus) -> bool:
        """See `ClaimStore`. One that took effect before it failed finds its own claim, as its caller looks for."""
        return self._call(lambda: self._claims.swap_claim(side, status))

    def beat(self, side: Side, status: ClaimStatus) -> bool:
        """See `ClaimStore`. Tried once: the next heartbeat is the retry."""
        with self._reported():
            return self._claims.beat(side, status)

    # --- log ---

    def check_owner(self) -> None:
        """Look at the log's first record and the cursor. See `ChannelBackend`."""
        self.load_cursor()
        with self._open_log(Position()) as log:
            self._call(lambda: self._read_from(log, 1))

    def recover(self) -> Tally:
        """Repair a torn tail and return what the log holds. See `ChannelBackend`."""
        with self._scanning:
            return self._call(self._recovered)

    def _recovered(self) -> Tally:
        try:
            if self._writing is None:
                self._check_there()  # a log that is away must not be begun anew
                self._writing = self._files.open_append(self._log)
                self._files.sync_directory(self._directory)
            self._scanner.close()
            tally = self._scan()
            size = os.fstat(self._writing).st_size
            if size > tally.last.offset:
                self._cut_torn_tail(tally.last.offset, size)
            return tally
        except OSError:
            self._stop_writing()
            raise

    def _stop_writing(self) -> None:
        """Let go of the log's descriptor, which may be stale: `recover` opens another."""
        descriptor, self._writing = self._writing, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _cut_torn_tail(self, end: int, size: int) -> None:
        assert self._writing is not None
        tail = os.pread(self._writing, size - end, end).split(b"\n")[:-1]  # the last one has no newline
        if any(is_intact(line) for line in tail):
            raise ChannelDamaged(
                f"{self._log} is damaged at offset {end}: expected record {self._tally.last.seq + 1}, found a hole "
                f"with an intact record behind it; {WAY_OUT}"
            )
        self._files.truncate(self._writing, end)
        self._files.sync(self._writing)

    def append(self, batch: Sequence[Framed], *, epoch: int) -> Position:
        """Write the batch with one write and one fsync. See `ChannelBackend`."""
        assert self._writing is not None, "recover() comes first"
        with self._scanning, self._reported():
            if not self._claims.is_newest("writer", epoch):
                raise ChannelBusy(f"the writer's claim {epoch} of {self.where} was taken over; stop here")
            size = os.fstat(self._writing).st_size
            if size != self._tally.last.offset:
                raise ChannelUnavailable(
                    f"{self._log} was changed by another process: expected {self._tally.last.offset} bytes, "
                    f"found {size}"
                )
            data = b"".join([item.line for item in batch])
            try:
                self._files.write(self._writing, data)
                self._files.sync(self._writing)
            except OSError:
                self._stop_writing()
                raise
            self._scanner.position = Position(batch[-1].record.seq, size + len(data), epoch)
            self._tally = self._tally.plus([item.record for item in batch], self._scanner.position)
        return self._tally.last

    def tally(self) -> Tally:
        """Scan what is new and return the totals. See `ChannelBackend`."""
        with self._scanning:
            return self._call(self._scan)

    def _scan(self) -> Tally:
        while self._tally.end is None and (entries := self._read_from(self._scanner, _SCAN)):
            self._tally = self._tally.plus([entry.record for entry in entries], self._scanner.position)
        return self._tally._replace(last=self._scanner.position)

    def _read_from(self, log: LogReader, max_records: int) -> list[Entry]:
        """Read on; after an error of the mount from the same place of a newly opened file: the old one may be stale."""
        before = log.position
        try:
            return log.read(max_records)
        except OSError:
            log.close()
            log.position = before  # what was taken before the error is read again
            raise
        except ChannelDamaged:
            self._check_there()
            raise

    def sample_ids(self, skip: int = 0) -> Iterator[str]:
        """Read the log from its beginning. See `ChannelBackend`."""
        with self._open_log(Position()) as log:
            seen = 0
            while entries := self._call(lambda: self._read_from(log, _SCAN)):
                names = [entry.record.ref.sample_id for entry in entries if isinstance(entry.record, RefRecord)]
                yield from names[max(0, skip - seen) :]
                seen += len(names)

    def read(self, position: Position, max_records: int) -> list[Entry]:
        """See `ChannelBackend`."""
        if self._reader.position != position:
            self._reader.close()
            self._reader = self._open_log(position)
        return self._call(lambda: self._read_from(self._reader, max_records))

    def _open_log(self, position: Position) -> LogReader:
        return LogReader(
            self._log,
            run_id=self._run_id,
            attempt=self._attempt,
            position=position,
            reopen=not self._local,
            clock=self._clock,
        )

    # --- cursor ---

    def load_cursor(self) -> Cursor | None:
        """See `ChannelBackend`."""
        data = self._call(self._cursor_bytes)
        if data is None:
            return None
        cursor = decode_document(data, Cursor, str(self._cursor))
        if (cursor.run_id, cursor.attempt) != (self._run_id, self._attempt):
            raise ForeignChannel(
                f"{self._cursor} belongs to attempt {cursor.attempt} of run {cursor.run_id!r}, expected attempt "
                f"{self._attempt} of run {self._run_id!r}; give each attempt a directory of its own"
            )
        return cursor

    def _cursor_bytes(self) -> bytes | None:
        try:
            return self._cursor.read_bytes()
        except FileNotFoundError:
            self._check_there()
            return None

    def store_cursor(self, cursor: Cursor) -> None:
        """See `ChannelBackend`."""
        self._call(lambda: self._replace_cursor(cursor))

    def _replace_cursor(self, cursor: Cursor) -> None:
        if not self._claims.is_newest("reader", cursor.epoch):
            raise ChannelBusy(f"the reader's claim {cursor.epoch} of {self.where} was taken over; stop here")
        draft = self._directory / f".cursor-{cursor.epoch:06d}.tmp"
        self._files.write_file(draft, frame(cursor), durable=True)
        self._files.replace(draft, self._cursor)
        self._files.sync_directory(self._directory)

    # --- waiting ---

    def wait_for_records(self, position: Position, timeout_s: float) -> None:
        """See `ChannelBackend`. A torn tail does not wake anybody until it grows or is cut."""
        seen = self._reader.seen_size if self._reader.position == position else position.offset
        self._wait(lambda: self._size() != seen, timeout_s)

    def wait_for_reader(self, seen: Cursor | None, timeout_s: float) -> None:
        """See `ChannelBackend`. On a local mount the cursor is read again once its file is another."""
        before = self._cursor_stamp()
        if self.load_cursor() != seen:
            return
        if self._local:
            self._wait(lambda: self._cursor_stamp() != before, timeout_s)
        else:  # a network mount remembers what it knows of a file until it is opened
            self._wait(lambda: self.load_cursor() != seen, timeout_s)

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        longest_s = _LONGEST_LOOK_S["local" if self._local else "remote"]
        with self._reported():
            wait_until(ready, timeout_s=timeout_s, every_s=_FIRST_LOOK_S, longest_s=longest_s)

    def _size(self) -> int:
        try:
            return self._log.stat().st_size
        except FileNotFoundError:
            self._check_there()
            return 0

    def _check_there(self) -> None:
        """Raise `FileNotFoundError` if the whole channel is away: an unmounted directory reads as an empty one."""
        self._claims.newest("writer")

    def _cursor_stamp(self) -> tuple[int, int, int] | None:
        """Return what differs after the cursor's file was replaced; None while there is none."""
        try:
            found = self._cursor.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def close(self) -> None:
        """See `ChannelBackend`."""
        self._reader.close()
        self._scanner.close()
        self._stop_writing()

    def _call(self, operation: Callable[[], _T]) -> _T:
        """Do what may be done twice, again for a moment if the mount fails: a name that is replaced may be stale."""
        retry = Retry(OSError, budget_s=_RETRY_S, every_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, sleep=self._pause)
        with self._reported():
            return retry(operation)

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)
        check_interrupt()

    def _reported(self) -> _Reported:
        return _Reported(self.where)


class _Reported:
    """Turns an operating system's error into `ChannelUnavailable`, which callers retry."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, ChannelUnavailable):
            raise ChannelUnavailable(
                f"{self._where} cannot be used: {error.strerror or error} ({error.filename or 'the log'}); check the "
                "mount, its space and its permissions"
            ) from error
