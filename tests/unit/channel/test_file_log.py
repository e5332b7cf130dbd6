"""The file backend against what crashes, power cuts and bad disks leave behind."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.channel.file.log import CHUNK, SETTLE_S
from disagg_core.channel.records import MAX_FRAME, EndRecord, frame
from disagg_core.errors import BadInput, ChannelDamaged, ChannelUnavailable
from tests.kit.waiting import eventually
from tests.unit.channel.kit import FakeClock, dead_process, drain, ids, make_ref, make_refs, names, totals_of

pytestmark = pytest.mark.unit


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A stream of five references in one batch."""
    with StreamingRefChannel(tmp_path) as writer:
        writer.publish_many(make_refs(5))
    return tmp_path / "refs.jsonl"


def change(path: Path, how: Callable[[list[bytes]], list[bytes]]) -> None:
    path.write_bytes(b"".join(how(path.read_bytes().splitlines(keepends=True))))


def test_a_torn_tail_is_waited_for_and_repaired_by_the_next_writer(log: Path) -> None:
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"crc":"0123')
    with StreamingRefChannel(log.parent) as reader:
        assert ids(drain(reader.poll)) == names(5)
        assert reader.poll(10) == []
        with StreamingRefChannel(log.parent) as writer:
            writer.publish(make_ref(5))
            assert writer.published == 6
        assert ids(reader.poll(10)) == names(5, 6)
    assert log.read_bytes().startswith(whole)


def test_a_line_torn_before_its_newline_only_is_not_read_twice(log: Path) -> None:
    log.write_bytes(log.read_bytes()[:-1])
    with StreamingRefChannel(log.parent) as reader, StreamingRefChannel(log.parent) as writer:
        assert ids(drain(reader.poll)) == names(4)
        writer.publish(make_ref(9))
        assert ids(reader.poll(10)) == names(9, 10)
        assert writer.published == 5


def test_an_end_that_counts_otherwise_is_damage_after_what_was_read(log: Path) -> None:
    end = EndRecord(seq=7, attempt=1, epoch=1, totals=totals_of(make_refs(6)))
    log.write_bytes(log.read_bytes() + frame(end))
    with StreamingRefChannel(log.parent) as reader:
        assert ids(reader.poll()) == names(5)
        for _ in range(2):
            with pytest.raises(ChannelDamaged, match=r"says 6 references of .* but 5 of"):
                reader.poll()
        assert not reader.is_closed()


def test_damage_in_the_middle_names_the_place_and_swallows_no_neighbour(log: Path) -> None:
    lines = log.read_bytes().splitlines(keepends=True)
    offset = sum(map(len, lines[:3]))
    change(log, lambda all_: [*all_[:3], all_[3].replace(b"target-1", b"target-2"), *all_[4:]])
    with StreamingRefChannel(log.parent) as reader:
        assert ids(reader.poll(10)) == names(2)
        for _ in range(2):
            with pytest.raises(
                ChannelDamaged, match=rf"refs.jsonl is damaged at offset {offset}, .*expected .*found crc"
            ):
                reader.poll(10)
    with pytest.raises(ChannelDamaged), StreamingRefChannel(log.parent) as writer:
        writer.publish(make_ref(5))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda lines: [*lines[:2], *lines[3:]], "expected record 3, found record 4"),
        (lambda lines: [*lines[:3], lines[2], *lines[3:]], "expected record 4, found record 3"),
        (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], "expected record 3, found record 4"),
        (lambda lines: [*lines[:2], lines[2].rstrip(b"\n"), *lines[3:]], "expected crc"),
        (lambda lines: [*lines[:2], b"\n", *lines[2:]], "expected a line starting with"),
        (lambda lines: [*lines[:2], b"x" * (3 * MAX_FRAME)], "no newline in that many"),
    ],
)
def test_lost_repeated_swapped_and_merged_lines_are_damage(
    log: Path, how: Callable[[list[bytes]], list[bytes]], message: str
) -> None:
    change(log, how)
    with StreamingRefChannel(log.parent) as reader:
        reader.poll(1)
        with pytest.raises(ChannelDamaged, match=message):
            drain(reader.poll)


def test_a_hole_is_waited_for_until_it_has_settled(log: Path) -> None:
    whole = log.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(lines[0]) + len(lines[1])
    log.write_bytes(whole[:start] + bytes(100) + whole[start + 100 :])
    clock = FakeClock()
    backend = FileBackend(log.parent, run_id="local", attempt=1, clock=clock)
    with StreamingRefChannel(log.parent, backend=backend) as reader:
        assert ids(reader.poll(10)) == names(1)
        assert reader.poll(10) == []
        log.write_bytes(whole)  # the mount has caught up
        assert ids(reader.poll(10)) == names(1, 5)
        log.write_bytes(whole + bytes(100) + b"\n" + lines[1])
        assert reader.poll(10) == []
        clock.now += SETTLE_S + 1
        with pytest.raises(ChannelDamaged):
            reader.poll(10)


def test_zeros_at_the_end_are_what_a_power_cut_leaves_and_are_cut_off(log: Path) -> None:
    log.write_bytes(log.read_bytes() + bytes(700) + b"\n" + bytes(20))
    with StreamingRefChannel(log.parent) as writer:
        writer.publish(make_ref(5))
    with StreamingRefChannel(log.parent) as reader:
        assert ids(drain(reader.poll)) == names(6)


def test_a_hole_with_an_intact_record_behind_it_is_not_cut_off(log: Path) -> None:
    change(log, lambda lines: [*lines[:3], bytes(10) + lines[3][10:], *lines[4:]])
    with pytest.raises(ChannelDamaged, match="intact record behind it"), StreamingRefChannel(log.parent) as writer:
        writer.publish(make_ref(5))


def test_a_log_that_lost_acknowledged_records_is_not_written_to(log: Path) -> None:
    with StreamingRefChannel(log.parent) as reader:
        reader.ack(reader.poll(5))
    change(log, lambda lines: lines[:3])
    with pytest.raises(ChannelDamaged, match="acknowledged record 6, but the stream ends at record 3"):
        StreamingRefChannel(log.parent).publish(make_ref(5))
    with StreamingRefChannel(log.parent) as reader, pytest.raises(ChannelDamaged, match="became shorter"):
        reader.poll(1)


def test_a_log_that_vanished_under_its_reader_is_damage(log: Path) -> None:
    with StreamingRefChannel(log.parent) as reader:
        reader.poll(1)
        reader.ack(make_refs(1))
    log.unlink()
    with StreamingRefChannel(log.parent) as reader, pytest.raises(ChannelDamaged, match="is gone"):
        reader.poll(1)


def test_a_closed_marker_of_an_older_design_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "refs.jsonl.closed").touch()
    (tmp_path / ".closed").touch()
    with StreamingRefChannel(tmp_path) as reader:
        assert reader.poll(1) == []
        assert not reader.is_closed()


def test_records_of_a_fenced_writer_are_passed_over(log: Path) -> None:
    stale = log.read_bytes().splitlines(keepends=True)[-1].replace(b"x", b"x")
    with StreamingRefChannel(log.parent) as writer:
        writer.publish(make_ref(5))
    with log.open("ab") as file:  # it had slept in the middle of its write
        file.write(stale)
    with StreamingRefChannel(log.parent) as writer:
        writer.publish(make_ref(6))
        assert writer.published == 7
    with StreamingRefChannel(log.parent) as reader:
        assert ids(drain(reader.poll)) == names(7)


class FullDisk(FileSystem):
    """Has no room for a while: it takes a part of what is written, and says so."""

    def __init__(self) -> None:
        self.room: int | None = None
        self.sync_fails = False

    def write(self, descriptor: int, data: bytes) -> None:
        if self.room is None or len(data) < 600:
            return super().write(descriptor, data)
        super().write(descriptor, data[: self.room])
        raise OSError(28, "No space left on device")

    def sync(self, descriptor: int) -> None:
        if self.sync_fails:
            raise OSError(5, "Input/output error")
        super().sync(descriptor)


@pytest.mark.parametrize("room", [0, 10, 1000, 2500])
def test_a_full_disk_is_transient_and_a_retry_doubles_nothing(tmp_path: Path, room: int) -> None:
    disk = FullDisk()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=disk)
    with StreamingRefChannel(tmp_path, backend=backend) as writer, StreamingRefChannel(tmp_path) as reader:
        writer.publish(make_ref(0))
        disk.room = room
        for _ in range(2):
            with pytest.raises(ChannelUnavailable, match="No space left"):
                writer.publish_many(make_refs(1, 5))
        early = drain(reader.poll)
        disk.room = None
        writer.publish_many(make_refs(1, 5))
        writer.close(totals_of(make_refs(5)))
        assert [*early, *reader.stream()] == make_refs(5)
        assert writer.published == 5


def test_a_failed_fsync_is_transient_and_a_retry_doubles_nothing(tmp_path: Path) -> None:
    disk = FullDisk()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=disk)
    with StreamingRefChannel(tmp_path, backend=backend) as writer, StreamingRefChannel(tmp_path) as reader:
        writer.publish(make_ref(0))
        disk.sync_fails = True
        with pytest.raises(ChannelUnavailable, match="Input/output error"):
            writer.publish_many(make_refs(1, 5))
        disk.sync_fails = False
        writer.publish_many(make_refs(1, 6))
        assert drain(reader.poll) == make_refs(6)


class CountingFiles(FileSystem):
    """Counts what is done to the log, and can hold a commit up."""

    def __init__(self) -> None:
        self.writes = self.syncs = 0
        self.go_on = threading.Event()
        self.go_on.set()

    def write(self, descriptor: int, data: bytes) -> None:
        self.writes += 1
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self.syncs += 1
        self.go_on.wait(60)
        super().sync(descriptor)


def test_a_batch_is_one_write_and_one_fsync(tmp_path: Path) -> None:
    files = CountingFiles()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=files)
    with StreamingRefChannel(tmp_path, backend=backend) as writer:
        writer.claim_writer()
        before = (files.writes, files.syncs)
        writer.publish_many(make_refs(64))
        assert (files.writes - before[0], files.syncs - before[1]) == (1, 1)


def test_publishers_that_arrive_during_a_commit_share_the_next_one(tmp_path: Path) -> None:
    files = CountingFiles()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=files)
    with StreamingRefChannel(tmp_path, backend=backend) as writer:
        writer.claim_writer()
        files.go_on.clear()
        before = files.syncs
        threads = [threading.Thread(target=writer.publish, args=[make_ref(ordinal)]) for ordinal in range(8)]
        threads[0].start()
        eventually(lambda: files.syncs > before)
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: len(writer._writer._waiting) == 7)
        files.go_on.set()
        for thread in threads:
            thread.join()
        assert files.syncs - before == 2
        assert writer.published == 8


def test_publishers_whose_commit_failed_all_learn_of_it(tmp_path: Path) -> None:
    files = CountingFiles()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=files)
    refused: list[int] = []

    def publish(ordinal: int) -> None:
        try:
            writer.publish(make_ref(ordinal))
        except BadInput:
            refused.append(ordinal)

    def refuse(*_: object, **__: object) -> None:
        raise BadInput("the server refused us")

    with StreamingRefChannel(tmp_path, backend=backend) as writer:
        writer.claim_writer()
        files.go_on.clear()
        before = files.syncs
        threads = [threading.Thread(target=publish, args=[ordinal]) for ordinal in range(4)]
        threads[0].start()
        eventually(lambda: files.syncs > before)
        for thread in threads[1:]:
            thread.start()
        eventually(lambda: len(writer._writer._waiting) == 3)
        backend.append = refuse  # type: ignore[method-assign,assignment]
        files.go_on.set()
        for thread in threads:
            thread.join()
        assert sorted(refused) == [1, 2, 3]
        assert writer.published == 1


def test_without_a_right_to_write_the_mount_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ChannelUnavailable, match="check the mount"):
        StreamingRefChannel(tmp_path / "file" / "channel").claim_writer()


def test_looking_at_a_channel_changes_nothing(tmp_path: Path) -> None:
    channel = StreamingRefChannel(tmp_path / "none")
    assert (channel.published, channel.in_flight_remote(), channel.is_closed()) == (0, 0, False)
    assert channel.reader_status().state == channel.writer_status().state == "absent"
    channel.disconnect()
    assert not (tmp_path / "none").exists()


def test_polling_is_done_in_bounded_pieces(tmp_path: Path) -> None:
    with StreamingRefChannel(tmp_path) as writer:
        writer.publish_many(make_refs(3000))
    with StreamingRefChannel(tmp_path) as reader:
        assert len(reader.poll(1)) == 1
        held = reader._backend._reader._lines
        assert sum(map(len, held)) <= 256 * 1024
        assert ids(drain(reader.poll, 1000)) == names(1, 3000)


def test_a_backlog_of_32000_is_read_once_and_not_again_with_each_poll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StreamingRefChannel(tmp_path) as writer:
        for start in range(0, 32_000, 4_000):
            writer.publish_many(make_refs(start, start + 4_000))
    read: list[int] = []
    pread = os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        data = pread(descriptor, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    with StreamingRefChannel(tmp_path) as reader:
        polls = 0
        while reader.poll(8):
            polls += 1
    size = (tmp_path / "refs.jsonl").stat().st_size
    assert polls == 4_000
    assert sum(read) < 1.05 * size
    assert len(read) < 1.2 * size / CHUNK + 5


def test_drafts_of_dead_processes_are_cleared_away(tmp_path: Path) -> None:
    for _ in range(5):
        channel = StreamingRefChannel(tmp_path, process=dead_process())
        channel.claim_writer()
        channel._writer._heartbeat.abandon()
    (tmp_path / ".writer-000001-deadbeef.tmp").touch()
    with StreamingRefChannel(tmp_path) as channel:
        channel.claim_writer()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refs.jsonl", "writer-000006.json"]


@pytest.mark.parametrize(
    "url", ["ftp://x/y", "file://host/dir", "file:", "redis://", "redis://h/notadb", "redis://h/0?x=1"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(BadInput):
        StreamingRefChannel(url)


def test_a_password_in_an_address_is_never_shown() -> None:
    channel = StreamingRefChannel("redis://user:secret@127.0.0.1:1/3")
    assert "secret" not in channel.where
    with pytest.raises(BadInput) as raised:
        StreamingRefChannel("redis://user:secret@127.0.0.1:1/3?x=1")
    assert "secret" not in str(raised.value)
