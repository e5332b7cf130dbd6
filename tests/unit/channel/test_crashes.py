"""Writer and reader killed at every write, fsync, link and rename, against a model of what must be in the stream.

The producer publishes ordinals 0, 1, 2, ... and, after a crash, goes on behind what the stream says is in it. So the
stream must hold 0 .. n-1 in order at any time, whatever happened; each new reader must start exactly behind what was
acknowledged; and the totals must be right in the end.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.contracts import SampleRef, ordinal_of
from disagg_core.errors import ChannelDamaged
from tests.unit.channel.kit import dead_process, make_ref, make_refs, totals_of

pytestmark = pytest.mark.unit

NO_HEARTBEATS = 1e6  # the background thread would make runs differ; beats are steps of the machine instead


Fault = tuple[int, int, bool] | None
"""Which operation from now dies, after how many bytes of a write, and whether it takes effect first."""

Action = Callable[[StreamingRefChannel], object]


class Crash(BaseException):
    """The process is gone."""


class FaultyFiles(FileSystem):
    """Dies at the n-th operation from now: before it, after it, or in the middle of a write."""

    def __init__(self) -> None:
        self.countdown: int | None = None
        self.torn = 0
        self.after = False
        self.synced: dict[int, int] = {}

    def arm(self, fault: Fault) -> None:
        self.countdown, self.torn, self.after = fault or (None, 0, False)

    def _fires(self) -> bool:
        if self.countdown is None:
            return False
        self.countdown -= 1
        if self.countdown >= 0:
            return False
        self.countdown = None
        return True

    def _step(self, effect: Callable[[], None]) -> None:
        fires = self._fires()
        if not fires or self.after:
            effect()
        if fires:
            raise Crash

    def write(self, descriptor: int, data: bytes) -> None:
        if self._fires():
            super().write(descriptor, data[: self.torn % (len(data) + 1)])
            raise Crash
        super().write(descriptor, data)

    def sync(self, descriptor: int) -> None:
        self._step(lambda: None)  # the kernel's memory survives the process; real syncs would only cost time

    def sync_directory(self, directory: Path) -> None:
        self._step(lambda: None)

    def truncate(self, descriptor: int, size: int) -> None:
        self._step(lambda: super(FaultyFiles, self).truncate(descriptor, size))

    def link(self, source: Path, target: Path) -> None:
        self._step(lambda: super(FaultyFiles, self).link(source, target))

    def replace(self, source: Path, target: Path) -> None:
        self._step(lambda: super(FaultyFiles, self).replace(source, target))

    def unlink(self, path: Path) -> None:
        self._step(lambda: super(FaultyFiles, self).unlink(path))


faults = st.one_of(st.none(), st.tuples(st.integers(0, 12), st.integers(0, 4000), st.booleans()))


class Side:
    """One process of the two, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()

    def start(self) -> None:
        self.files = FaultyFiles()
        backend = FileBackend(self.directory, run_id="local", attempt=1, files=self.files, local=True)
        self.channel = StreamingRefChannel(
            self.directory, backend=backend, lease_s=NO_HEARTBEATS, process=dead_process()
        )

    def run(self, action: Action, fault: Fault) -> bool:
        """Do something that may kill the process; return whether it survived."""
        self.files.arm(fault)
        try:
            action(self.channel)
        except Crash:
            self.kill()
            return False
        self.files.arm(None)
        return True

    def kill(self) -> None:
        for part in (self.channel._writer, self.channel._reader):
            if part._heartbeat is not None:
                part._heartbeat.abandon()
                part._heartbeat = None
        self.channel._backend.close()
        self.start()

    def stop(self) -> None:
        self.channel.disconnect()
        self.start()


class Channel(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name) / "channel"
        self.writer, self.reader = Side(path), Side(path)
        self.durable = 0  # published, and said so
        self.next = 0  # the producer's next ordinal; unknown (None) after a crash, until it asks the stream
        self.producer_knows = True
        self.acked = (0, 0)  # at least and at most so many acknowledged
        self.held: list[SampleRef] = []  # polled and not acknowledged
        self.expected: int | None = None  # the next ordinal to be delivered; None right after a restart
        self.over: str | None = None

    # --- writer ---

    def _resume_producer(self) -> None:
        if not self.producer_knows:
            present = [ordinal_of(name) for name in self.writer.channel.published_sample_ids()]
            assert present == list(range(len(present))), "order or completeness lost"
            assert len(present) >= self.durable, "something durable was lost"
            self.next, self.producer_knows = len(present), True
            self.durable = len(present)

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(1, 9), fault=faults)
    def publish(self, count: int, fault: Fault) -> None:
        if not self._writer_does(lambda channel: channel.claim_writer(), None):
            return
        self._resume_producer()
        refs = make_refs(self.next, self.next + count)
        if self._writer_does(lambda channel: channel.publish_many(refs), fault):
            self.next = self.durable = self.next + count

    @precondition(lambda self: not self.over)
    @rule(fault=faults)
    def claim_writer(self, fault: Fault) -> None:
        self._writer_does(lambda channel: channel.claim_writer(), fault)

    def _writer_does(self, action: Action, fault: Fault) -> bool:
        survived = self.writer.run(action, fault)
        self.producer_knows &= survived
        return survived

    @precondition(lambda self: not self.over)
    @rule(kill=st.booleans())
    def restart_writer(self, kill: bool) -> None:
        self.writer.kill() if kill else self.writer.stop()
        self.producer_knows = False

    # --- reader ---

    @precondition(lambda self: not self.over)
    @rule(count=st.none() | st.integers(1, 12), fault=faults)
    def poll(self, count: int | None, fault: Fault) -> None:
        got: list[SampleRef] = []
        if not self.reader.run(lambda channel: got.extend(channel.poll(count)), fault):
            self._reader_lost()
            return
        assert count is None or len(got) <= count
        for ref in got:
            ordinal = ordinal_of(ref.sample_id)
            if self.expected is None:
                assert self.acked[0] <= ordinal <= self.acked[1], "a new reader starts behind what is acknowledged"
                self.acked = (ordinal, ordinal)
                self.expected = ordinal
            assert ordinal == self.expected, "order, or exactly once"
            assert ref == make_ref(ordinal)
            self.expected += 1
            self.held.append(ref)

    @precondition(lambda self: not self.over and self.held)
    @rule(share=st.floats(0, 1), fault=faults)
    def ack(self, share: float, fault: Fault) -> None:
        refs = self.held[: max(1, round(share * len(self.held)))]
        upper = ordinal_of(refs[-1].sample_id) + 1
        self.acked = (self.acked[0], max(self.acked[1], upper))
        if self.reader.run(lambda channel: channel.ack(refs), fault):
            self.held = self.held[len(refs) :]
            self.acked = (upper, upper)
        else:
            self._reader_lost()

    @precondition(lambda self: not self.over)
    @rule(kill=st.booleans())
    def restart_reader(self, kill: bool) -> None:
        self.reader.kill() if kill else self.reader.stop()
        self._reader_lost()

    def _reader_lost(self) -> None:
        self.held, self.expected = [], None

    # --- the world ---

    @precondition(lambda self: not self.over)
    @rule(times=st.integers(1, 3))
    def heartbeats_come_twice(self, times: int) -> None:
        for side, part in (("writer", self.writer.channel._writer), ("reader", self.reader.channel._reader)):
            if part._heartbeat is not None:
                old = part._heartbeat.claim
                part._heartbeat.beat()
                for _ in range(times):
                    part._session.backend.beat(side, old)

    @precondition(lambda self: not self.over)
    @rule(garbage=st.binary(min_size=1, max_size=40))
    def a_fenced_writer_wakes_up_in_the_middle_of_a_write(self, garbage: bytes) -> None:
        log = self.writer.directory / "refs.jsonl"
        if log.exists() and b"\n" not in garbage:
            self.writer.kill()
            self.producer_knows = False
            with log.open("ab") as file:
                file.write(garbage)

    @invariant()
    def in_flight_adds_up(self) -> None:
        if hasattr(self, "writer") and not self.over and self.producer_knows and self.writer.channel._writer.claimed:
            in_flight = self.writer.channel.in_flight_remote()
            assert self.next - self.acked[1] <= in_flight <= self.next - self.acked[0]

    def teardown(self) -> None:
        if not hasattr(self, "writer"):
            return
        self.writer.kill()
        self.reader.kill()
        self.writer.channel.claim_writer()
        self.producer_knows = False
        self._resume_producer()
        self.writer.channel.publish(make_ref(self.next))
        self.writer.channel.close(totals_of(make_refs(self.next + 1)))
        rest = list(self.reader.channel.stream())
        first = ordinal_of(rest[0].sample_id)
        assert self.acked[0] <= first <= self.acked[1]
        assert [ordinal_of(ref.sample_id) for ref in rest] == list(range(first, self.next + 1))
        assert self.reader.channel.totals == totals_of(make_refs(self.next + 1))
        self.reader.channel.ack(rest)
        assert self.writer.channel.in_flight_remote() == 0
        self.writer.stop()
        self.reader.stop()
        self.directory.cleanup()


TestCrashes = Channel.TestCase
TestCrashes.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)


@pytest.mark.slow
class TestManyCrashes(Channel.TestCase):
    settings = settings(max_examples=2000, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("operation", range(14))
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("torn", [0, 17, 2000])
def test_every_boundary_of_a_first_publication(tmp_path: Path, operation: int, after: bool, torn: int) -> None:
    writer, reader = Side(tmp_path), Side(tmp_path)
    writer.run(lambda channel: channel.publish_many(make_refs(5)), (operation, torn, after))
    present = len(list(writer.channel.published_sample_ids()))
    writer.channel.publish_many(make_refs(present, 6))
    writer.channel.close(totals_of(make_refs(6)))
    assert list(reader.channel.stream()) == make_refs(6)
    writer.stop()
    reader.stop()


def test_a_power_cut_that_takes_acknowledged_records_ends_the_run_by_name(tmp_path: Path) -> None:
    writer, reader = Side(tmp_path), Side(tmp_path)
    writer.channel.publish_many(make_refs(3))
    kept = (tmp_path / "refs.jsonl").read_bytes()
    writer.run(lambda channel: channel.publish_many(make_refs(3, 6)), (1, 10_000, False))  # written, not yet synced
    reader.channel.ack(reader.channel.poll(10))  # read and trained before the sync
    (tmp_path / "refs.jsonl").write_bytes(kept)
    writer.kill()
    with pytest.raises(ChannelDamaged, match="records that were written are gone"):
        writer.channel.publish(make_ref(3))
    writer.stop()
    reader.kill()
