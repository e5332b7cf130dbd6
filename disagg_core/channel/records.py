"""The channel's records and their framing: one JSON line each, with a checksum over everything behind it.

A line is ``{"crc":"0a1b2c3d",<the rest>`` and a newline. The checksum (zlib's crc32) covers the bytes of *the rest*,
up to and without the newline. It stands first and has a fixed width, so that it is checked before anything is parsed,
and the whole line is still plain JSON for whoever looks at it.
"""

from __future__ import annotations

import re
import zlib
from typing import TypeVar

import msgspec
from msgspec.structs import astuple

from disagg_core.contracts import SampleRef, StreamTotals, assert_no_tensors
from disagg_core.errors import ChannelDamaged, FailureClass

MAX_FRAME = 1 << 20
"""Longest line, in bytes. A longer one is refused by the writer, and damage to the reader."""

_WRITTEN = re.compile(rb'\{"crc":"([0-9a-f]{8})",')
_REST = len('{"crc":"01234567",')
_T = TypeVar("_T")


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every record carries: its number, counted from 1, the attempt, and the claim it was written under."""

    seq: int
    attempt: int
    epoch: int


class OpenRecord(_Record, frozen=True, tag="open"):
    """A writer took the claim: the stream's first record, and one more for each restart of the producer."""

    run_id: str
    host: str
    pid: int


class RefRecord(_Record, frozen=True, tag="ref"):
    """One published reference."""

    ref: SampleRef


class EndRecord(_Record, frozen=True, tag="end"):
    """The stream is complete; nothing follows."""

    totals: StreamTotals


class FailRecord(_Record, frozen=True, tag="failed"):
    """The producer gave up; nothing follows."""

    reason: str
    failure_class: FailureClass


Record = OpenRecord | RefRecord | EndRecord | FailRecord

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)
_ref_decoder = msgspec.json.Decoder(SampleRef)
_decodable: set[tuple[type, ...]] = set()


class BadFrame(ValueError):
    """A line is not a frame: `expected` and `found` say why. Callers add the place."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(f"expected {expected}, found {found}")
        self.expected = expected
        self.found = found


def frame(value: msgspec.Struct) -> bytes:
    """Encode a struct as one framed line, newline included."""
    rest = _encoder.encode(value)[1:]
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(rest), rest)


def encode_ref(ref: SampleRef) -> bytes:
    """Encode a reference, and make sure that the reader will be able to decode it.

    Decoding it again for the purpose would cost more than all the rest, so that is done once for each combination of
    field types that comes along.

    Raises:
        TypeError: it holds a tensor, or a field of the wrong type.
        ValueError: it is too long for a record.
    """
    try:
        encoded = _encoder.encode(ref)
        types = tuple(map(type, astuple(ref)))
        if types not in _decodable:
            _ref_decoder.decode(encoded)
            _decodable.add(types)
    except (TypeError, msgspec.ValidationError) as error:
        assert_no_tensors(ref)
        raise TypeError(f"reference {ref.sample_id!r} does not fit its schema: {error}") from error
    if len(encoded) > MAX_FRAME - 1024:
        raise ValueError(
            f"reference {ref.sample_id!r} takes {len(encoded)} bytes, more than the {MAX_FRAME - 1024} that a record "
            "may have; metadata is for short notes"
        )
    return encoded


def frame_ref(encoded: bytes, *, seq: int, attempt: int, epoch: int) -> bytes:
    """Frame a reference that `encode_ref` encoded: the bytes of ``frame(RefRecord(...))`` without a second pass."""
    rest = b'"kind":"ref","seq":%d,"attempt":%d,"epoch":%d,"ref":%b}' % (seq, attempt, epoch, encoded)
    return b'{"crc":"%08x",%b\n' % (zlib.crc32(rest), rest)


def unframe(line: bytes) -> bytes:
    """Return the JSON object inside a framed line (without its newline), after checking the checksum.

    Raises:
        BadFrame: the line is no frame, or its checksum does not match.
    """
    rest = line[_REST:]
    actual = zlib.crc32(rest)
    if line[:_REST] != b'{"crc":"%08x",' % actual:
        written = _WRITTEN.match(line)
        if not written:
            raise BadFrame('a line starting with {"crc":"<8 hex digits>",', repr(line[:40]))
        raise BadFrame(f"crc {written[1].decode()}", f"crc {actual:08x} over {len(rest)} bytes")
    return b"{" + rest


def decode_record(line: bytes) -> Record:
    """Decode one line (without its newline) of the stream.

    Raises:
        BadFrame: damaged, or written by an incompatible version.
    """
    rest = line[_REST:]
    if line[:_REST] != b'{"crc":"%08x",' % zlib.crc32(rest):
        unframe(line)  # says what is wrong
    try:
        return _decoder.decode(b"{" + rest)
    except msgspec.MsgspecError as error:
        raise BadFrame("a record of this version", f"{error} in {line[:80]!r}") from error


def decode_document(data: bytes, kind: type[_T], where: str) -> _T:
    """Decode one framed document that is not part of the stream: a cursor.

    Raises:
        ChannelDamaged: `where` does not hold an intact document of `kind`.
    """
    try:
        return msgspec.json.decode(unframe(data.removesuffix(b"\n")), type=kind)
    except (BadFrame, msgspec.MsgspecError) as error:
        raise ChannelDamaged(f"{where} is damaged: {error}; start a new attempt with a fresh channel") from error
