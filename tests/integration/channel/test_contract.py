"""What the channel promises, on both backends alike; each row of the design's table of first mistakes is a test."""

import queue
import threading
import time

import pytest

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.channel.contract import Cursor
from disagg_core.contracts import Capture, RunIdentity, SampleRef, StreamTotals
from disagg_core.errors import (
    BadInput,
    ChannelBusy,
    ChannelClosed,
    ChannelStalled,
    ChannelUnavailable,
    ForeignChannel,
    IdentityMismatch,
    ProducerFailed,
)
from tests.integration.channel.conftest import Place
from tests.kit.waiting import eventually
from tests.unit.channel.kit import (
    FakeClock,
    dead_process,
    drain,
    elsewhere,
    ids,
    make_ref,
    make_refs,
    names,
    totals_of,
)

pytestmark = pytest.mark.integration


# --- order, completeness, ends ---


def test_every_reference_arrives_once_in_order_and_then_the_end(place: Place) -> None:
    writer, reader = place.open(), place.open()
    refs = make_refs(100)
    writer.publish(refs[0])
    writer.publish_many(refs[1:64])
    writer.publish_many(refs[64:])
    writer.close(totals_of(refs, rejected=3))

    assert list(reader.stream()) == refs
    assert reader.is_closed()
    assert reader.totals == totals_of(refs, rejected=3)
    assert reader.poll(10) == []


def test_a_stream_that_merely_stops_is_not_ended(place: Place) -> None:
    clock = FakeClock()
    writer, reader = place.open(), place.open(idle_timeout_s=60.0, clock=clock)
    writer.publish_many(make_refs(3))
    writer.disconnect()

    assert ids(reader.poll(10)) == names(3)
    assert reader.poll(10) == []
    assert not reader.is_closed()
    assert reader.writer_status().state == "released"
    clock.now += 61.0
    with pytest.raises(ChannelStalled, match=r"producer \(writer\) made no progress for 6.*wrote record 4"):
        reader.poll(10)


def test_a_failure_comes_after_everything_that_was_published(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(5))
    writer.fail("no target answers", "target_unavailable")

    assert ids(reader.poll(100)) == names(5)
    with pytest.raises(ProducerFailed, match="no target answers") as raised:
        reader.poll(100)
    assert raised.value.failure_class == "target_unavailable"
    assert reader.writer_status().state == "failed"
    assert not reader.is_closed()


def test_a_producer_may_fail_before_it_published_anything(place: Place) -> None:
    place.open().fail("the target did not load", "bad_input")
    with pytest.raises(ProducerFailed, match="did not load"):
        place.open().poll(1)


def test_nothing_follows_an_end(place: Place) -> None:
    writer = place.open()
    writer.publish_many(make_refs(2))
    writer.close(totals_of(make_refs(2)))
    with pytest.raises(ChannelClosed, match="2 references"):
        writer.publish(make_ref(2))
    with pytest.raises(ChannelClosed):
        writer.fail("late")
    writer.disconnect()
    with pytest.raises(ChannelClosed):
        place.open().publish(make_ref(2))


def test_totals_must_say_what_was_published(place: Place) -> None:
    writer = place.open()
    writer.publish_many(make_refs(2))
    with pytest.raises(ValueError, match="3 references"):
        writer.close(totals_of(make_refs(3)))
    writer.close(totals_of(make_refs(2)))


def test_an_empty_stream_can_end(place: Place) -> None:
    place.open().close(StreamTotals(refs=0, bytes=0, prompts=4, rejected=4))
    reader = place.open()
    assert list(reader.stream()) == []
    assert reader.totals == StreamTotals(refs=0, bytes=0, prompts=4, rejected=4)


def test_references_with_unusual_text_survive(place: Place) -> None:
    odd = make_ref(0, metadata={"note": 'line\nbreak "quotes" \x00 \u2028 snow ☃', "n": 1.5, "none": None, "yes": True})
    place.open().publish(odd)
    assert place.open().poll(1) == [odd]


def test_a_tensor_is_refused_and_nothing_is_published(place: Place) -> None:
    writer = place.open()
    with pytest.raises(TypeError, match=r"metadata\['hidden'\]"):
        writer.publish_many([make_ref(0), make_ref(1, metadata={"hidden": object()})])
    with pytest.raises(TypeError, match="num_tokens"):
        writer.publish(make_ref(1, num_tokens="many"))
    with pytest.raises(ValueError, match="metadata is for short notes"):
        writer.publish(make_ref(1, metadata={"note": "x" * (1 << 20)}))
    assert writer.published == 0


def test_poll_returns_no_more_than_asked_for(place: Place) -> None:
    place.open().publish_many(make_refs(10))
    reader = place.open()
    assert [len(reader.poll(n)) for n in (1, 4, 3, 100)] == [1, 4, 3, 2]
    with pytest.raises(ValueError, match="at least 1"):
        reader.poll(0)


def test_poll_without_a_bound_returns_everything_that_is_there(place: Place) -> None:
    writer, reader = place.open(), place.open()
    assert reader.poll() == []
    writer.publish_many(make_refs(2500))
    assert reader.poll(100) == make_refs(100)
    assert reader.poll() == make_refs(100, 2500)
    assert reader.poll() == []
    writer.publish_many(make_refs(2500, 2503))
    assert ids(reader.poll()) == names(2500, 2503)


def test_poll_without_a_bound_meets_the_end_after_everything_before_it(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(5))
    writer.close(totals_of(make_refs(5)))
    assert ids(reader.poll()) == names(5)
    assert reader.is_closed()
    assert reader.poll() == []


def test_references_read_before_the_channel_fails_are_returned_before_the_error(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(1500))
    read, calls = reader._backend.read, []

    def unreachable_at_second(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise ChannelUnavailable("no answer")
        return read(*given)

    monkeypatch.setattr(reader._backend, "read", unreachable_at_second)
    first = reader.poll()
    assert 0 < len(first) < 1500
    assert first + reader.poll() == make_refs(1500)


# --- counts, acknowledgement, restarts ---


def test_in_flight_is_published_minus_acknowledged_also_right_after_restarts(place: Place) -> None:
    writer, reader = place.open(), place.open()
    refs = make_refs(10)
    writer.publish_many(refs)
    reader.ack(reader.poll(4), step=1)
    assert (writer.in_flight_remote(), writer.in_flight_bytes_remote()) == (6, sum(r.size_bytes for r in refs[4:]))

    writer.disconnect()
    again = place.open()
    assert again.in_flight_remote() == 6  # before it even claims
    again.publish(make_ref(10))
    assert (again.in_flight_remote(), again.published) == (7, 11)

    reader.disconnect()
    assert place.open().poll(1)
    assert again.in_flight_remote() == 7


def test_both_sides_see_how_much_is_consumed_also_right_after_restarts(place: Place) -> None:
    writer, reader = place.open(), place.open()
    assert (writer.consumed_remote(), reader.consumed_remote()) == (0, 0)
    writer.publish_many(make_refs(10))
    refs = reader.poll()
    assert writer.consumed_remote() == 0  # delivered is not consumed
    reader.ack(refs[:4], step=1)
    reader.quarantine(refs[4:5])
    for channel in (writer, reader):
        assert channel.consumed_remote() == 5
        assert channel.consumed_remote() + channel.in_flight_remote() == channel.published == 10

    writer.disconnect()
    reader.disconnect()
    again = place.open()
    assert again.consumed_remote() == 5
    again.ack(again.poll(2), step=2)
    assert place.open().consumed_remote() == 7


def test_a_restarted_producer_learns_what_is_in_the_stream(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(6))
    reader.ack(reader.poll(4), step=1)
    place.crash(writer)
    assert list(place.open().published_sample_ids()) == names(6)


def test_a_restarted_consumer_goes_on_behind_what_it_acknowledged(place: Place) -> None:
    writer, first = place.open(), place.open()
    writer.publish_many(make_refs(12))
    first.ack(first.poll(10), step=5)
    first.poll(1)
    first.disconnect()

    second = place.open()
    assert ids(second.poll(100)) == names(10, 12)
    second.ack(make_refs(10, 11), step=6)
    assert writer.in_flight_remote() == 1  # 11 acknowledged, not 1


def test_acknowledgement_moves_over_the_settled_beginning_only(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(6))
    refs = reader.poll(6)
    reader.ack(refs[3:], step=2)
    assert writer.in_flight_remote() == 6
    reader.ack(refs[:2], step=3)
    assert writer.in_flight_remote() == 4
    reader.quarantine(refs[2:3])
    assert writer.in_flight_remote() == 0


def slow_cursor(
    reader: StreamingRefChannel, monkeypatch: pytest.MonkeyPatch
) -> tuple[threading.Event, threading.Event]:
    """Let the reader's cursor be written once it may; return what says that it is about to, and that it may."""
    writing, may = threading.Event(), threading.Event()
    store_cursor = reader._backend.store_cursor

    def slowly(cursor: Cursor) -> None:
        writing.set()
        assert may.wait(60)
        store_cursor(cursor)

    monkeypatch.setattr(reader._backend, "store_cursor", slowly)
    return writing, may


def test_references_come_while_the_cursor_is_being_written(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(4))
    refs = reader.poll(2)
    writing, may = slow_cursor(reader, monkeypatch)
    acknowledging = threading.Thread(target=reader.ack, args=(refs,))
    acknowledging.start()
    assert writing.wait(60)

    assert ids(reader.poll(2)) == names(2, 4)
    assert writer.consumed_remote() == 0
    may.set()
    acknowledging.join(60)
    assert writer.consumed_remote() == 2


def test_one_thread_polls_and_another_acknowledges_and_the_cursor_is_exact(place: Place) -> None:
    """Every third reference is dropped, for its draft is too old; the cursor moves over those from either thread."""
    total = 600
    writer, reader = place.open(), place.open(max_draft_lag=2, draft_version=lambda: 5)
    refs = [make_ref(n, draft_weight_version=1 if n % 3 == 0 else 5) for n in range(total)]
    windows: queue.SimpleQueue[list[SampleRef] | None] = queue.SimpleQueue()

    def acknowledge() -> None:
        for step, window in enumerate(iter(windows.get, None), start=1):
            reader.ack(window, step=step)

    acknowledging = threading.Thread(target=acknowledge)
    acknowledging.start()
    writer.publish_many(refs)
    writer.close(totals_of(refs))
    while window := reader.poll(7):
        windows.put(window)
    windows.put(None)
    acknowledging.join(60)

    assert writer.in_flight_remote() == 0
    cursor = reader._backend.load_cursor()
    assert (cursor.refs, cursor.dropped, cursor.bytes) == (total, total // 3, sum(ref.size_bytes for ref in refs))


def test_an_acknowledgement_that_failed_is_made_again_whatever_moved_the_cursor_meanwhile(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(5))
    refs = reader.poll(4)
    store_cursor, full = reader._backend.store_cursor, [ChannelUnavailable("no space"), ChannelUnavailable("no space")]

    def fails_at_first(cursor: Cursor) -> None:
        if full:
            raise full.pop()
        store_cursor(cursor)

    monkeypatch.setattr(reader._backend, "store_cursor", fails_at_first)
    with pytest.raises(ChannelUnavailable):
        reader.ack(refs[:2], step=1)
    assert ids(reader.poll(1)) == names(4, 5)
    with pytest.raises(ChannelUnavailable):
        reader.ack(refs[:2], step=1)
    assert writer.consumed_remote() == 0, "references come without a write of the cursor"

    reader.quarantine([refs[2]])  # another thread's
    assert writer.consumed_remote() == 3
    reader.ack(refs[:2], step=1)
    with pytest.raises(ChannelClosed, match="acknowledged before"):
        reader.ack(refs[:2], step=1)
    reader.ack([refs[3]], step=2)
    cursor = reader._backend.load_cursor()
    assert (cursor.refs, cursor.quarantined, cursor.step) == (4, 1, 2)


def test_what_is_dropped_last_is_behind_the_cursor_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is dropped while the cursor is being written: no poll comes after the end."""
    writer, reader = place.open(), place.open(max_draft_lag=2, draft_version=lambda: 5)
    refs = [make_ref(n, draft_weight_version=5 if n == 0 else 1) for n in range(3)]
    writer.publish_many(refs)
    writer.close(totals_of(refs))
    first = reader.poll(1)
    writing, may = slow_cursor(reader, monkeypatch)
    acknowledging = threading.Thread(target=reader.ack, args=(first,))
    acknowledging.start()
    assert writing.wait(60)
    threading.Timer(0.05, may.set).start()

    assert reader.poll() == []
    acknowledging.join(60)
    assert reader.is_closed()
    assert writer.in_flight_remote() == 0


def test_the_last_word_acknowledges_what_could_not_be_acknowledged_before(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(3))
    refs = reader.poll()

    def fails(cursor: Cursor) -> None:
        raise ChannelUnavailable(f"no space for {cursor.refs} references")

    with monkeypatch.context() as full:
        full.setattr(reader._backend, "store_cursor", fails)
        with pytest.raises(ChannelUnavailable):
            reader.ack(refs[:2], step=1)

    reader.finish("max_steps")

    assert (writer.reader_status().state, writer.in_flight_remote()) == ("done", 1)


def test_only_what_was_delivered_can_be_acknowledged_and_only_once(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(3))
    refs = reader.poll(2)
    with pytest.raises(ChannelClosed, match="never delivered"):
        reader.ack(make_refs(3))
    assert writer.in_flight_remote() == 3
    reader.ack(refs)
    with pytest.raises(ChannelClosed, match="acknowledged before"):
        reader.ack(refs)


# --- one writer, one reader, one attempt ---


def test_a_second_writer_and_a_second_reader_are_refused_by_name(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish(make_ref(0))
    reader.poll(1)
    with pytest.raises(ChannelBusy, match=r"writer already: pid \d+ on .*last heartbeat"):
        place.open().publish(make_ref(1))
    with pytest.raises(ChannelBusy, match="reader already"):
        place.open().poll(1)
    with pytest.raises(ChannelBusy, match="reader already"):
        place.open().ack([])
    assert list(writer.published_sample_ids()) == names(1)


def test_the_claim_of_a_dead_process_is_taken_over(place: Place) -> None:
    writer, reader = place.open(process=dead_process()), place.open(process=dead_process())
    writer.publish_many(make_refs(3))
    reader.ack(reader.poll(2))
    place.crash(writer)
    place.crash(reader)

    heir = place.open()
    heir.publish(make_ref(3))
    assert ids(place.open().poll(10)) == names(2, 4)


def test_a_writer_that_was_taken_over_is_fenced(place: Place) -> None:
    old = place.open(process=dead_process())  # it is alive, but looks dead to everybody
    old.publish_many(make_refs(3))
    new = place.open()
    new.publish(make_ref(3))
    with pytest.raises(ChannelBusy, match="taken over"):
        old.publish(make_ref(99))
    new.publish(make_ref(4))
    assert ids(place.open().poll(10)) == names(5)


def test_a_reader_that_was_taken_over_cannot_move_the_cursor(place: Place) -> None:
    writer, old = place.open(), place.open(process=dead_process())
    writer.publish_many(make_refs(6))
    mine = old.poll(2)
    new = place.open()
    new.ack(new.poll(5))
    with pytest.raises(ChannelBusy, match="taken over"):
        old.ack(mine)
    assert writer.in_flight_remote() == 1


def test_a_claim_on_another_machine_is_kept_by_its_heartbeat_and_lost_without(place: Place) -> None:
    writer = place.open(process=elsewhere(), lease_s=0.6)
    writer.publish(make_ref(0))
    with pytest.raises(ChannelBusy):
        place.open(lease_s=0.6).publish(make_ref(1))
    place.crash(writer)
    began = time.monotonic()
    place.open(lease_s=0.6).publish(make_ref(1))
    assert time.monotonic() - began >= 0.6


def test_the_channel_of_another_attempt_or_run_is_refused(place: Place) -> None:
    old = place.open(attempt=1)
    old.publish_many(make_refs(3))
    old.close(totals_of(make_refs(3)))
    old.disconnect()

    for options in ({"attempt": 2}, {"run_id": "another"}):
        with pytest.raises(ForeignChannel, match=r"attempt 1 of run 'local', expected"):
            place.open(**options).poll(1)
        with pytest.raises(ForeignChannel):
            place.open(**options).claim_writer()
    assert list(place.open().stream()) == make_refs(3)  # and it was left as it was


def test_a_stale_claim_or_cursor_alone_is_refused_too(place: Place) -> None:
    place.open().poll(1)
    place.opened[0].finish("done")
    place.opened[0].disconnect()
    with pytest.raises(ForeignChannel):
        place.open(attempt=2).publish(make_ref(0, attempt=2))


def test_references_of_another_run_cannot_be_published(place: Place) -> None:
    writer = place.open()
    for wrong in ({"run_id": "x"}, {"attempt": 2}, {"schema_version": 9}):
        with pytest.raises(IdentityMismatch):
            writer.publish(make_ref(0, **wrong))


# --- the two sides learn about each other ---


def test_a_waiting_producer_learns_that_the_consumer_is_done(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(4))
    reader.ack(reader.poll(2))
    assert writer.in_flight_remote() == 2
    finisher = threading.Timer(0.1, reader.finish, ["reached max_steps"])
    finisher.start()
    began = time.monotonic()
    status = writer.wait_for_reader_change(60.0)
    finisher.join()
    assert (status.state, status.reason, status.active) == ("done", "reached max_steps", False)
    assert time.monotonic() - began < 30.0


def test_a_waiting_producer_learns_that_the_consumer_failed_or_died(place: Place) -> None:
    writer, reader = place.open(), place.open(process=dead_process())
    writer.publish_many(make_refs(4))
    reader.poll(1)
    writer.in_flight_remote()
    assert writer.wait_for_reader_change(60.0).state == "lost"  # its process is not there
    place.crash(reader)
    heir = place.open()
    heir.abandon("loss is nan", "bug")
    assert writer.wait_for_reader_change(60.0).state == "failed"


def test_a_waiting_producer_wakes_up_on_an_acknowledgement(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(4))
    refs = reader.poll(4)
    assert writer.in_flight_remote() == 4
    timer = threading.Timer(0.1, reader.ack, [refs])
    timer.start()
    began = time.monotonic()
    assert writer.wait_for_reader_change(60.0).state == "running"
    timer.join()
    assert time.monotonic() - began < 30.0
    assert writer.in_flight_remote() == 0


def test_a_consumer_without_progress_stalls_its_producer_by_name(place: Place) -> None:
    clock = FakeClock()
    writer, reader = place.open(idle_timeout_s=30.0, clock=clock), place.open()
    writer.publish_many(make_refs(4))
    reader.poll(2)
    reader.note_progress("writing checkpoint step-20")
    reader._reader._heartbeat.beat()
    writer.in_flight_remote()
    writer.wait_for_reader_change(0.0)
    clock.now += 29.0
    reader._reader._heartbeat.beat()  # a heartbeat is no progress
    writer.wait_for_reader_change(0.0)
    clock.now += 2.0
    with pytest.raises(ChannelStalled, match=r"consumer \(reader\) made no progress for 31.*checkpoint step-20"):
        writer.wait_for_reader_change(0.0)


def test_progress_of_the_producer_keeps_a_waiting_consumer_patient(place: Place) -> None:
    clock = FakeClock()
    writer, reader = place.open(), place.open(idle_timeout_s=30.0, clock=clock)
    writer.claim_writer()
    for step in range(4):
        assert reader.poll(1) == []
        clock.now += 20.0
        writer.note_progress(f"loading shard {step}")
        writer._writer._heartbeat.beat()
    assert reader.poll(1) == []


def test_the_reader_says_its_last_word_once(place: Place) -> None:
    reader = place.open()
    reader.finish("max_steps")
    with pytest.raises(ChannelClosed, match="done: max_steps"):
        reader.abandon("afterthought")
    reader.disconnect()
    with pytest.raises(ChannelClosed, match="done: max_steps"):
        place.open().poll(1)


def test_a_waiting_reader_wakes_up_within_50_ms_without_burning_a_core(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.claim_writer()
    assert reader.poll(8) == []
    latencies = []
    cpu = time.process_time()
    for ordinal in range(10):
        published: list[float] = []

        def publish(ordinal: int = ordinal, published: list[float] = published) -> None:
            writer.publish(make_ref(ordinal))
            published.append(time.monotonic())

        timer = threading.Timer(0.1, publish)
        timer.start()
        while not (refs := reader.poll(8)):
            reader.wait(5.0)
        seen = time.monotonic()
        timer.join()
        reader.ack(refs)
        latencies.append(seen - published[0])
    assert sorted(latencies)[5] < 0.05
    assert time.process_time() - cpu < 0.5  # of more than one second spent waiting


# --- group commit from several threads ---


def test_concurrent_publishers_lose_nothing_and_keep_their_own_order(place: Place) -> None:
    writer, reader = place.open(), place.open()
    refs = make_refs(300)

    def publish(worker: int) -> None:
        for start in range(worker * 100, worker * 100 + 100, 10):
            writer.publish_many(refs[start : start + 10])

    threads = [threading.Thread(target=publish, args=[worker]) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close(totals_of(refs))
    found = list(reader.stream())
    assert sorted(ids(found)) == names(300)
    for worker in range(3):
        mine = [name for name in ids(found) if name in set(names(worker * 100, worker * 100 + 100))]
        assert mine == names(worker * 100, worker * 100 + 100)


# --- the queue ---


def test_the_queue_waits_for_whole_batches_and_delivers_the_short_last_one(place: Place) -> None:
    writer, queue = place.open(), StreamingRefQueue(place.open())
    writer.publish_many(make_refs(3))
    with pytest.raises(TimeoutError, match="3 of 4"):
        queue.get(4, timeout=0.05)
    timer = threading.Timer(0.1, writer.publish_many, [make_refs(3, 10)])
    timer.start()
    first = queue.get(4, timeout=60)
    timer.join()
    writer.close(totals_of(make_refs(10)))
    assert ids(first) == names(4)
    assert queue.depth() == 6
    assert ids(queue.get(4)) == names(4, 8)
    last = queue.get(4)
    assert ids(last) == names(8, 10)
    assert queue.get(4) == []
    queue.ack(make_refs(8), step=1)
    queue.ack(last, step=2)
    assert writer.in_flight_remote() == 0
    assert queue.totals == totals_of(make_refs(10))


def test_what_is_put_back_comes_first_and_in_order(place: Place) -> None:
    writer, queue = place.open(), StreamingRefQueue(place.open())
    writer.publish_many(make_refs(8))
    first, second = queue.get(3), queue.get(3)
    queue.fail(second, "the store blinked")
    queue.fail([first[2], first[0]], "the store blinked")
    assert ids(queue.get(4)) == [first[0].sample_id, first[2].sample_id, *ids(second)[:2]]
    assert ids(queue.get(3)) == [second[2].sample_id, *names(6, 8)]
    with pytest.raises(ValueError, match="handed out"):
        queue.fail([make_ref(99)], "whose is it")


def test_what_cannot_be_retried_is_quarantined_acknowledged_and_listed(place: Place) -> None:
    writer, queue = place.open(), StreamingRefQueue(place.open())
    writer.publish_many(make_refs(3))
    refs = queue.get(3)
    queue.fail(refs[:1], "checksum differs", retryable=False)
    assert queue.quarantined == [(refs[0], "checksum differs")]
    assert writer.in_flight_remote() == 2
    queue.ack(refs[1:])
    assert writer.in_flight_remote() == 0


def test_the_queue_passes_on_the_producers_failure(place: Place) -> None:
    writer, queue = place.open(), StreamingRefQueue(place.open())
    writer.publish_many(make_refs(5))
    writer.fail("lost the target")
    assert len(queue.get(4)) == 4
    with pytest.raises(ProducerFailed):
        queue.get(4)


# --- staleness ---


def identity(**changes: object) -> RunIdentity:
    fields: dict[str, object] = {
        "run_id": "local",
        "attempt": 1,
        "strategy": "eagle3",
        "target_model_version": "target-1",
        "tokenizer_version": "tok-1",
        "vocab_map_version": "vocab-1",
        "draft_weight_version": 0,
        "capture": Capture(layers=(1,), last_hidden_state=True),
        "dtype": "bfloat16",
    }
    return RunIdentity(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["target_model_version", "tokenizer_version", "vocab_map_version", "strategy"])
def test_a_reference_of_another_target_is_refused_by_name(place: Place, field: str) -> None:
    writer, reader = place.open(), place.open(identity=identity())
    writer.publish_many([make_ref(0), make_ref(1, **{field: "other"}), make_ref(2)])
    assert ids(reader.poll(10)) == names(1)
    for _ in range(2):
        with pytest.raises(IdentityMismatch, match=rf"{field} 'other', expected"):
            reader.poll(10)
    assert reader.refused >= 1


def test_references_of_an_old_draft_are_dropped_counted_handed_on_and_acknowledged(place: Place) -> None:
    freed: list[str] = []
    writer = place.open()
    reader = place.open(max_draft_lag=2, draft_version=lambda: 5, on_drop=lambda ref: freed.append(ref.sample_id))
    refs = [make_ref(n, draft_weight_version=version) for n, version in enumerate([2, 3, 5, 0, 2])]
    writer.publish_many(refs)
    writer.close(totals_of(refs))

    kept = reader.poll(10)
    assert ids(kept) == [refs[1].sample_id, refs[2].sample_id]
    assert ids(reader.dropped) == freed == [refs[0].sample_id, refs[3].sample_id, refs[4].sample_id]
    assert writer.in_flight_remote() == 4  # the first is behind the cursor at once
    reader.ack(kept)
    assert writer.in_flight_remote() == 0
    reader.disconnect()
    assert reader._backend.load_cursor().dropped == 3


def test_a_drop_that_cannot_be_acknowledged_at_once_loses_no_reference(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = place.open(), place.open(max_draft_lag=2, draft_version=lambda: 5)
    refs = [make_ref(0, draft_weight_version=1), make_ref(1, draft_weight_version=5)]
    writer.publish_many(refs)

    def unreachable(cursor: object) -> None:
        raise ChannelUnavailable("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(reader._backend, "store_cursor", unreachable)
        kept = reader.poll()
        with pytest.raises(ChannelUnavailable):
            reader.poll()
    assert ids(kept) == [refs[1].sample_id]
    assert writer.consumed_remote() == 0
    reader.ack(kept)
    assert writer.consumed_remote() == 2


def test_a_draft_limit_without_a_version_is_refused(place: Place) -> None:
    with pytest.raises(BadInput, match="draft_version"):
        place.open(max_draft_lag=1)


def test_everything_is_stopped_by_disconnecting(place: Place) -> None:
    before = set(threading.enumerate())
    channel = place.open()
    channel.publish(make_ref(0))
    channel.poll(1)
    assert {thread.name for thread in set(threading.enumerate()) - before} == {
        "draftline-writer-heartbeat",
        "draftline-reader-heartbeat",
    }
    channel.disconnect()
    eventually(lambda: set(threading.enumerate()) <= before)
    drained = place.open()
    assert ids(drain(drained.poll)) == names(1)
