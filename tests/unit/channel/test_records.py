"""Framing: what was written is what is read, and nothing else is taken for a record."""

import json
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_core.channel.contract import Cursor
from disagg_core.channel.records import (
    BadFrame,
    EndRecord,
    FailRecord,
    OpenRecord,
    RefRecord,
    decode_document,
    decode_record,
    encode_ref,
    frame,
    frame_ref,
)
from disagg_core.errors import ChannelDamaged
from tests.unit.channel.kit import make_ref, make_refs, totals_of

pytestmark = pytest.mark.unit

RECORDS = [
    OpenRecord(seq=1, attempt=1, epoch=1, run_id="r", host="h", pid=7),
    RefRecord(seq=2, attempt=1, epoch=1, ref=make_ref(0)),
    EndRecord(seq=3, attempt=1, epoch=1, totals=totals_of(make_refs(1))),
    FailRecord(seq=3, attempt=1, epoch=1, reason="because\nof this", failure_class="bug"),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_is_one_line_of_json_and_comes_back_equal(record: msgspec.Struct) -> None:
    line = frame(record)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert json.loads(line)["crc"] == f"{zlib.crc32(line[18:-1]):08x}"
    assert decode_record(line[:-1]) == record


def test_the_short_way_to_frame_a_reference_gives_the_same_record() -> None:
    line = frame_ref(encode_ref(make_ref(4)), seq=9, attempt=2, epoch=3)
    assert decode_record(line[:-1]) == RefRecord(seq=9, attempt=2, epoch=3, ref=make_ref(4))


@given(place=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed(place: int, mask: int) -> None:
    line = bytearray(frame(RECORDS[1])[:-1])
    line[place % len(line)] ^= mask
    with pytest.raises(BadFrame):
        decode_record(bytes(line))


@given(length=st.integers(0, 10_000))
def test_no_beginning_of_a_record_is_a_record(length: int) -> None:
    line = frame(RECORDS[1])[:-1]
    with pytest.raises(BadFrame):
        decode_record(line[: length % len(line)])


def test_a_record_of_another_version_is_named() -> None:
    rest = b'"kind":"surprise","seq":1,"attempt":1,"epoch":1}'
    with pytest.raises(BadFrame, match="a record of this version"):
        decode_record(b'{"crc":"%08x",' % zlib.crc32(rest) + rest)


def test_a_damaged_cursor_names_its_file() -> None:
    data = bytearray(frame(Cursor(run_id="r", attempt=1, epoch=1, seq=10)))
    data[40] ^= 1
    with pytest.raises(ChannelDamaged, match=r"cursor\.json is damaged: expected crc"):
        decode_document(bytes(data), Cursor, "cursor.json")
