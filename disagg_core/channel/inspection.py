"""Looking into a channel from outside: records, cursor, lag, claims, end state, damage. Claims and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from time import monotonic

import msgspec
from pydantic import SecretStr

from disagg_core.channel.backends import directory_of
from disagg_core.channel.contract import ChannelBackend, Cursor, Position, Tally
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.liveness import LEASE_S, PeerStatus, PeerWatch
from disagg_core.channel.records import BadFrame, EndRecord, unframe
from disagg_core.channel.redis.address import RedisAddress, channel_documents, channel_names
from disagg_core.channel.redis.backend import RedisBackend
from disagg_core.channel.writer import describe_end
from disagg_core.errors import BadInput, ChannelDamaged

_AT_ONCE = 1024


@dataclass(frozen=True)
class ChannelInspection:
    """What a channel looked like at one moment.

    `tally` counts the intact records from the beginning; `unfinished_bytes` are behind them (file backend: a record
    that is being written, or a torn tail); `damage` is the error that a reader would meet, or None.
    """

    where: str
    run_id: str
    attempt: int
    tally: Tally
    cursor: Cursor | None
    writer: PeerStatus
    reader: PeerStatus
    unfinished_bytes: int
    damage: str | None

    @property
    def lag_refs(self) -> int:
        """References published and not acknowledged."""
        return self.tally.refs - (self.cursor.refs if self.cursor else 0)

    @property
    def lag_bytes(self) -> int:
        """Bytes published and not acknowledged."""
        return self.tally.bytes - (self.cursor.bytes if self.cursor else 0)

    @property
    def finished(self) -> bool:
        """Whether nothing more can happen: damaged, or both sides are in a terminal state."""
        return self.damage is not None or (self.writer.terminal and self.reader.terminal)


class _Owner(msgspec.Struct):
    """The part of any document of a channel that says whose it is."""

    run_id: str
    attempt: int


class Inspector:
    """Looks at one channel, once or again and again; later looks cost only what is new."""

    def __init__(self, url: str | Path, *, password: SecretStr | None = None, ca: Path | None = None) -> None:
        directory = directory_of(url)
        backend: ChannelBackend
        if directory is not None:
            owner = _owner(_file_documents(directory), f"{directory} holds no channel")
            backend = FileBackend(directory.absolute(), run_id=owner.run_id, attempt=owner.attempt)
        else:
            address = RedisAddress.parse(str(url))
            name = address.name or _only_name(address, password, ca)
            documents = channel_documents(address, name, password=password, ca=ca)
            owner = _owner(documents, f"{address.shown} holds no channel {name!r}")
            backend = RedisBackend(
                f"{address.url}?channel={name}",
                run_id=owner.run_id,
                attempt=owner.attempt,
                password=password,
                ca=ca,
                reconnect_s=0.0,
            )
        self._owner = owner
        self._backend = backend
        self._log = None if directory is None else directory / "refs.jsonl"
        self._walked = Position()
        self._counted = Tally()
        self._peers = {"writer": PeerWatch(LEASE_S, monotonic), "reader": PeerWatch(LEASE_S, monotonic)}

    def look(self) -> ChannelInspection:
        """Return what the channel looks like now.

        Raises:
            ChannelUnavailable: the mount or the server does not answer.
        """
        cursor: Cursor | None = None
        damage: str | None = None
        try:
            cursor = self._backend.load_cursor()
            self._walk(cursor)
        except ChannelDamaged as error:
            damage = str(error)
        tally = self._counted if self._log else self._backend.tally()
        return ChannelInspection(
            where=self._backend.where,
            run_id=self._owner.run_id,
            attempt=self._owner.attempt,
            tally=tally,
            cursor=cursor,
            writer=self._writer(tally),
            reader=self._reader(cursor),
            unfinished_bytes=self._size() - tally.last.offset if self._log else 0,
            damage=damage,
        )

    def _walk(self, cursor: Cursor | None) -> None:
        """Read every record once, from the beginning or, where acknowledged ones are trimmed, from the cursor."""
        while True:
            if self._log is None and cursor is not None and cursor.seq > self._walked.seq:
                self._walked = cursor.position
            try:
                entries = self._backend.read(self._walked, _AT_ONCE)
            except ChannelDamaged:
                now = self._backend.load_cursor()
                if self._log is not None or now is None or now.seq <= self._walked.seq:
                    raise
                cursor = now  # not damaged: acknowledged and trimmed while we read
                continue
            if not entries:
                return
            self._walked = entries[-1].after
            self._counted = self._counted.plus([entry.record for entry in entries], self._walked)
            if self._counted.end is not None:
                return

    def _size(self) -> int:
        assert self._log is not None
        return self._log.stat().st_size if self._log.exists() else 0

    def _writer(self, tally: Tally) -> PeerStatus:
        claim = self._backend.read_claim("writer")
        if tally.end is not None:
            state = "ended" if isinstance(tally.end, EndRecord) else "failed"
            return PeerStatus("writer", state, describe_end(tally.end), claim)  # type: ignore[arg-type]
        return PeerStatus("writer", self._peers["writer"].state(claim), claim=claim)

    def _reader(self, cursor: Cursor | None) -> PeerStatus:
        claim = self._backend.read_claim("reader")
        if cursor is not None and cursor.state != "running":
            return PeerStatus("reader", cursor.state, cursor.reason, claim)
        return PeerStatus("reader", self._peers["reader"].state(claim), claim=claim)

    def close(self) -> None:
        """Let go of files and connections."""
        self._backend.close()


def inspect_channel(url: str | Path, *, password: SecretStr | None = None, ca: Path | None = None) -> ChannelInspection:
    """Look into a channel once, whatever run it belongs to.

    Raises:
        BadInput: there is no channel at `url`.
    """
    inspector = Inspector(url, password=password, ca=ca)
    try:
        return inspector.look()
    finally:
        inspector.close()


def _file_documents(directory: Path) -> Iterable[bytes]:
    log = directory / "refs.jsonl"
    if log.is_file():
        with log.open("rb") as file:
            yield file.readline()
    for path in sorted(directory.glob("*.json")):
        yield path.read_bytes()


def _owner(documents: Iterable[bytes], otherwise: str) -> _Owner:
    """Return whose channel it is, from the first document that can be read."""
    for document in documents:
        try:
            return msgspec.json.decode(unframe(document.removesuffix(b"\n")), type=_Owner)
        except (BadFrame, msgspec.MsgspecError):
            continue  # damaged: the walk will say so; some other document names the owner
    raise BadInput(f"{otherwise} (nothing readable that names its run)")


def _only_name(address: RedisAddress, password: SecretStr | None, ca: Path | None) -> str:
    names = channel_names(address, password=password, ca=ca)
    if len(names) != 1:
        raise BadInput(
            f"{address.shown} holds {len(names)} channels; add ?channel=<name>: {', '.join(names) or 'none'}"
        )
    return names[0]


def render(found: ChannelInspection) -> str:
    """Return an inspection as lines for a terminal."""
    tally, cursor = found.tally, found.cursor
    lines = [
        f"channel   {found.where}",
        f"run       {found.run_id}, attempt {found.attempt}",
        f"records   {tally.last.seq}, of them {tally.refs} references of {_bytes(tally.bytes)}",
    ]
    if cursor is None:
        lines.append("cursor    none: nothing was acknowledged yet")
    else:
        step = "" if cursor.step is None else f", step {cursor.step}"
        when = datetime.fromtimestamp(cursor.heartbeat)
        lines.append(
            f"cursor    record {cursor.seq}: {cursor.refs} references of {_bytes(cursor.bytes)}{step}, "
            f"{cursor.quarantined} quarantined, {cursor.dropped} dropped, at {when:%Y-%m-%d %H:%M:%S}"
        )
    lines.append(f"lag       {found.lag_refs} references of {_bytes(found.lag_bytes)}")
    lines.append(f"writer    {found.writer.describe()}")
    lines.append(f"reader    {found.reader.describe()}")
    lines.append(f"end       {describe_end(tally.end) if tally.end else 'none yet: the stream is open'}")
    if found.unfinished_bytes > 0 and found.damage is None:
        lines.append(f"tail      {found.unfinished_bytes} bytes without a complete record (being written, or torn)")
    lines.append(f"damage    {found.damage or 'none'}")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
