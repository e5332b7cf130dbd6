"""The Redis backend: Redis Streams on a server that both sides reach, for pools with no shared mount.

Keys, all below ``draftline:{<name>}:``

::

    refs      stream; the entry <seq>-0 holds record <seq>; trimmed up to what is acknowledged
    ids       list of every published sample id, which outlives the trimming
    meta      hash: run id, attempt, last seq, counts, the end record
    cursor    the reader's cursor
    writer    hash: epoch and status of the newest claim       reader    likewise

Appending, claiming and acknowledging are scripts, so each happens entirely or not at all, fencing included, and can
be sent again when an answer was lost. A broken connection is retried for `reconnect_s` seconds. Heartbeats also say how
long the server keeps the channel after the last one. Sample data never goes here; give the server an append-only file
and the ``noeviction`` policy.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import SecretStr

from disagg_core.channel.contract import ClaimStatus, Cursor, Entry, Framed, Position, Side, Tally
from disagg_core.channel.liveness import LEASE_S
from disagg_core.channel.records import (
    BadFrame,
    EndRecord,
    FailRecord,
    RefRecord,
    decode_document,
    decode_record,
    frame,
)
from disagg_core.channel.redis import scripts as redis_scripts
from disagg_core.channel.redis.address import RedisAddress, answered, connect, keys_of
from disagg_core.errors import BadInput, ChannelBusy, ChannelDamaged, ChannelUnavailable, ForeignChannel
from disagg_core.processes.interrupt import check_interrupt
from disagg_core.processes.retry import Retry, wait_until

KEEP_S = 7 * 24 * 3600
"""Seconds for which the server keeps a channel after its last heartbeat."""

RECONNECT_S = LEASE_S
"""How long a server may be silent: no longer than the other side takes to call us dead."""

_APPEND_AT_ONCE = 512
_IDS_AT_ONCE = 4096
_BLOCK_S = 0.25
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.002, 0.025
_T = TypeVar("_T")


class RedisBackend:
    """A `ChannelBackend` on a Redis server."""

    def __init__(
        self,
        url: str,
        *,
        run_id: str,
        attempt: int,
        password: SecretStr | None = None,
        ca: Path | None = None,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        address = RedisAddress.parse(url)
        name = address.name or f"{run_id}/{attempt}"
        self.where = f"{address.shown}?channel={name}"
        # Untyped: the client's own annotations are unions over all its modes; results are annotated where they arrive.
        self._client: Any = connect(address, password=password, ca=ca)
        self._run_id = run_id
        self._attempt = attempt
        self._reconnect_s = reconnect_s
        self._closing = threading.Event()
        keys = keys_of(name)
        self._refs, self._ids, self._meta, self._cursor = keys["refs"], keys["ids"], keys["meta"], keys["cursor"]
        self._claim: dict[Side, str] = {"writer": keys["writer"], "reader": keys["reader"]}
        self._swap = self._client.register_script(redis_scripts.SWAP_CLAIM)
        self._beat: Any = self._client.register_script(redis_scripts.BEAT)
        self._append = self._client.register_script(redis_scripts.APPEND)
        self._store: Any = self._client.register_script(redis_scripts.STORE_CURSOR)

    def _call(self, command: Callable[[], _T]) -> _T:
        """Send a command that may be sent twice, again and again while the server does not answer."""
        retry = Retry(
            ChannelUnavailable,
            budget_s=self._reconnect_s,
            every_s=_FIRST_PAUSE_S,
            longest_s=_LONGEST_PAUSE_S,
            sleep=self._pause,
        )
        return retry(self._answered, command)

    def _answered(self, command: Callable[[], _T]) -> _T:
        try:
            return answered(self.where, command)
        except ChannelUnavailable:  # the server may have another address by now: connect anew, do not reuse
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise ChannelUnavailable(f"{self.where} was closed while its server was away")
        check_interrupt()

    # --- claims ---

    def read_claim(self, side: Side) -> ClaimStatus | None:
        """See `ClaimStore`."""
        status: bytes | None = self._call(lambda: self._client.hget(self._claim[side], "status"))
        return None if status is None else decode_document(status, ClaimStatus, f"{self.where}: the {side}'s claim")

    def swap_claim(self, side: Side, status: ClaimStatus) -> bool:
        """See `ClaimStore`."""
        return bool(self._call(lambda: self._swap(keys=[self._claim[side]], args=[status.epoch, frame(status)])))

    def beat(self, side: Side, status: ClaimStatus) -> bool:
        """See `ClaimStore`. Sent once: the next heartbeat is the retry."""
        other = self._claim["reader" if side == "writer" else "writer"]
        keys = [self._claim[side], other, self._refs, self._ids, self._meta, self._cursor]
        arguments: list[Any] = [status.epoch, frame(status), KEEP_S]
        return bool(self._answered(lambda: self._beat(keys=keys, args=arguments)))

    # --- log ---

    def check_owner(self) -> None:
        """See `ChannelBackend`."""
        self.load_cursor()
        run_id, attempt = self._call(lambda: self._client.hmget(self._meta, ["run_id", "attempt"]))
        if run_id is not None and (run_id.decode(), int(attempt)) != (self._run_id, self._attempt):
            raise self._foreign("the stream", run_id.decode(), int(attempt))

    def _foreign(self, what: str, run_id: str, attempt: int) -> ForeignChannel:
        return ForeignChannel(
            f"{self.where}: {what} belongs to attempt {attempt} of run {run_id!r}, expected attempt {self._attempt} of "
            f"run {self._run_id!r}; give each attempt a channel of its own"
        )

    def recover(self) -> Tally:
        """See `ChannelBackend`. Nothing is ever torn here; the server's eviction policy is checked instead."""
        self.check_owner()
        memory: dict[str, Any] = self._call(lambda: self._client.info("memory"))
        policy = str(memory.get("maxmemory_policy", "noeviction"))
        if memory.get("maxmemory") and policy != "noeviction":  # heartbeats make every key volatile
            raise BadInput(f"{self.where} evicts keys ({policy}): references would vanish; set noeviction")
        return self.tally()

    def append(self, batch: Sequence[Framed], *, epoch: int) -> Position:
        """See `ChannelBackend`."""
        for start in range(0, len(batch), _APPEND_AT_ONCE):
            self._append_part(batch[start : start + _APPEND_AT_ONCE], epoch)
        return Position(batch[-1].record.seq, 0, epoch)

    def _append_part(self, part: Sequence[Framed], epoch: int) -> None:
        first = part[0].record.seq
        tally = Tally().plus([item.record for item in part], Position())
        arguments: list[Any] = [epoch, uuid.uuid4().hex, first, self._run_id, self._attempt, tally.refs, tally.bytes]
        arguments.append(part[-1].line if tally.end else b"")
        for item in part:
            arguments += (item.line, item.record.ref.sample_id if isinstance(item.record, RefRecord) else "")
        keys = [self._refs, self._ids, self._meta, self._claim["writer"]]
        outcome, last = self._call(lambda: self._append(keys=keys, args=arguments))
        if outcome == -1:
            raise ChannelBusy(f"the writer's claim {epoch} of {self.where} was taken over; stop here")
        if outcome == 0 and last < first - 1:
            raise self._lost(first - 1, last)
        if outcome == 0:
            raise ChannelUnavailable(f"{self.where} has record {last}, expected {first - 1} as the last one")

    def _lost(self, expected: int, found: int) -> ChannelDamaged:
        return ChannelDamaged(
            f"{self.where}: expected the stream to reach record {expected}, found it ending at {found}: the server "
            "lost what it had accepted (is it without an append-only file, or was it flushed?); start a new attempt"
        )

    def tally(self) -> Tally:
        """See `ChannelBackend`."""
        names = ["seq", "refs", "bytes", "epoch", "end"]
        seq, refs, size, epoch, end = self._call(lambda: self._client.hmget(self._meta, names))
        if seq is None:
            return Tally()
        ending = None if end is None else self._ending(end)
        return Tally(Position(int(seq), 0, int(epoch)), int(refs), int(size), ending)

    def _ending(self, line: bytes) -> EndRecord | FailRecord:
        record = decode_record(line.removesuffix(b"\n"))
        assert isinstance(record, (EndRecord, FailRecord))
        return record

    def sample_ids(self, skip: int = 0) -> Iterator[str]:
        """See `ChannelBackend`."""
        start = skip
        while ids := self._ids_from(start):
            yield from (sample_id.decode() for sample_id in ids)
            start += len(ids)

    def _ids_from(self, start: int) -> list[bytes]:
        ids: list[bytes] = self._call(lambda: self._client.lrange(self._ids, start, start + _IDS_AT_ONCE - 1))
        return ids

    def read(self, position: Position, max_records: int) -> list[Entry]:
        """See `ChannelBackend`."""
        found: Any = self._call(lambda: self._client.xread({self._refs: f"{position.seq}-0"}, count=max_records))
        if not found:
            last = self.tally().last.seq
            if last < position.seq:
                raise self._lost(position.seq, last)
            return []
        entries: list[Entry] = []
        for entry_id, fields in found[0][1]:
            try:
                record = decode_record(fields[b"r"].removesuffix(b"\n"))
                if record.seq != position.seq + 1:
                    raise BadFrame(f"record {position.seq + 1}", f"record {record.seq}")
            except (BadFrame, KeyError) as error:
                if entries:  # what is intact comes first; the next call raises
                    break
                raise ChannelDamaged(
                    f"{self.where} is damaged at entry {entry_id.decode()}, where record {position.seq + 1} should be: "
                    f"{error}; start a new attempt"
                ) from error
            self._check_record(record.attempt, record.ref.run_id if isinstance(record, RefRecord) else self._run_id)
            position = Position(record.seq, 0, record.epoch)
            entries.append(Entry(record, position))
        return entries

    def _check_record(self, attempt: int, run_id: str) -> None:
        if (attempt, run_id) != (self._attempt, self._run_id):
            raise self._foreign("a record", run_id, attempt)

    # --- cursor ---

    def load_cursor(self) -> Cursor | None:
        """See `ChannelBackend`."""
        data: bytes | None = self._call(lambda: self._client.get(self._cursor))
        if data is None:
            return None
        cursor = decode_document(data, Cursor, f"{self.where}: the cursor")
        if (cursor.run_id, cursor.attempt) != (self._run_id, self._attempt):
            raise self._foreign("the cursor", cursor.run_id, cursor.attempt)
        return cursor

    def store_cursor(self, cursor: Cursor) -> None:
        """See `ChannelBackend`. Trims the stream up to what is acknowledged."""
        keys = [self._cursor, self._claim["reader"], self._refs]
        arguments: list[Any] = [cursor.epoch, frame(cursor), cursor.seq + 1]
        if not self._call(lambda: self._store(keys=keys, args=arguments)):
            raise ChannelBusy(f"the reader's claim {cursor.epoch} of {self.where} was taken over; stop here")

    # --- waiting ---

    def wait_for_records(self, position: Position, timeout_s: float) -> None:
        """See `ChannelBackend`. The server wakes us."""
        block = max(1, int(min(timeout_s, _BLOCK_S) * 1000))
        self._call(lambda: self._client.xread({self._refs: f"{position.seq}-0"}, count=1, block=block))

    def wait_for_reader(self, seen: Cursor | None, timeout_s: float) -> None:
        """See `ChannelBackend`."""
        closing = self._closing
        wait_until(
            lambda: closing.is_set() or self.load_cursor() != seen,
            timeout_s=timeout_s,
            every_s=_FIRST_LOOK_S,
            longest_s=_LONGEST_LOOK_S,
            sleep=closing.wait,
        )

    def close(self) -> None:
        """See `ChannelBackend`. Whoever waits in another thread is let go."""
        self._closing.set()
        self._closing = threading.Event()
        self._client.close()
