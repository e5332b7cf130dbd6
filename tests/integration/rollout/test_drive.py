"""The drive loop between a target that misbehaves, a real store and a real channel."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from disagg_core.channel.file.backend import FileBackend
from disagg_core.errors import (
    ChannelUnavailable,
    Preempted,
    ProducerFailed,
    RoleFailed,
    StoreError,
    TargetUnavailable,
)
from disagg_core.rollout.producer import build_disagg_online_producer
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.run_spec.document import RolloutSection
from disagg_core.store import MooncakeFeatureStore
from tests.integration.rollout.rollout_kit import Consumer, ScriptedTarget, tasks_of
from tests.kit.waiting import eventually
from tests.unit.channel.kit import dead_process

pytestmark = pytest.mark.integration


def producer(bench, prompts, target, *, window=1, store=None, **options):
    """Return a drive over `prompts`; keywords of the rollout section go into it."""
    section = {name: options.pop(name) for name in list(options) if name in RolloutSection.model_fields}
    channel = options.pop("channel", None) or bench.open_channel()
    _, drive = build_disagg_online_producer(
        prompts=prompts, target=target, store=store or bench.store, channel=channel, identity=bench.identity,
        rollout=RolloutSection(**section), window=window, **options,
    )  # fmt: skip
    return drive


@pytest.mark.parametrize(("window", "high", "batch"), [(1, 4, 1), (3, 4, 8), (4, 4, 8), (4, 7, 4), (3, 64, 8)])
@pytest.mark.parametrize(("ordered", "workers"), [(True, 1), (True, 3), (False, 3)])
def test_every_prompt_is_trained_once_under_any_watermarks(bench, window, high, batch, ordered, workers):
    target = ScriptedTarget(batch_size=batch)
    drive = producer(
        bench, tasks_of(23), target, window=window, high_watermark_refs=high, ordered=ordered, workers=workers
    )

    with Consumer(bench.open_channel(), bench.store, window=window) as consumer:
        totals = drive()

    assert (totals.refs, totals.prompts, totals.rejected) == (23, 23, 0)
    assert sorted(consumer.ordinals) == list(range(23))
    if ordered:
        assert consumer.ordinals == list(range(23))
    assert bench.store.key_count() == 0


def test_in_flight_never_exceeds_the_high_watermark(bench):
    seen = []
    probe = bench.open_channel()
    drive = producer(bench, tasks_of(60), ScriptedTarget(batch_size=4), window=2, high_watermark_refs=10)

    def look():
        seen.append((probe.in_flight_remote(), bench.store.key_count()))

    with Consumer(bench.open_channel(), bench.store, window=2, before_ack=look):
        drive()

    assert max(in_flight for in_flight, _ in seen) <= 10
    assert max(keys for _, keys in seen) <= 10
    assert max(in_flight for in_flight, _ in seen) >= 6


def test_a_prompt_that_fails_each_time_is_quarantined_with_its_reason(bench):
    told = []
    target = ScriptedTarget(lambda task, tries: "it chokes on this" if task.ordinal == 5 else None, batch_size=4)
    source = PromptSource.of_tasks(tasks_of(12), group=4, max_attempts=3, on_reject=told.append)
    drive = producer(bench, source, target)

    with Consumer(bench.open_channel(), bench.store) as consumer:
        totals = drive()

    assert (totals.refs, totals.prompts, totals.rejected) == (11, 12, 1)
    assert consumer.ordinals == [n for n in range(12) if n != 5]
    assert target.tries[5] == 3
    assert [(r.ordinal, r.kind, r.reason, r.attempts) for r in told] == [(5, "quarantined", "it chokes on this", 3)]


def test_an_unusable_sample_is_rejected_at_once(bench):
    target = ScriptedTarget(lambda task, tries: "never: too long" if task.ordinal == 2 else None)
    drive = producer(bench, tasks_of(4), target)
    totals = drive()
    assert (totals.refs, totals.rejected, target.tries[2]) == (3, 1, 1)


def test_a_poisonous_prompt_does_not_take_its_neighbours_along(bench):
    """Prompt 9 kills its server: everything that is in flight with it at that moment fails too."""
    changed, in_flight, killed = threading.Condition(), set(), set()

    def before(tasks):
        (ordinal,) = (task.ordinal for task in tasks)
        with changed:
            in_flight.add(ordinal)
            changed.notify_all()
            if ordinal == 9:
                changed.wait_for(lambda: len(in_flight - killed) == 8, timeout=0.5)  # in company, if there is any
                killed.update(in_flight)
            elif changed.wait_for(lambda: 9 in in_flight, timeout=0.05):
                changed.wait_for(lambda: ordinal in killed, timeout=20)
            in_flight.remove(ordinal)
            changed.notify_all()

    def script(task, tries):
        if task.ordinal in killed:
            killed.remove(task.ordinal)
            return "the server died"
        return None

    target = ScriptedTarget(script, concurrency=8, before=before)
    drive = producer(bench, tasks_of(60), target, high_watermark_refs=64)
    totals = drive()
    assert (totals.refs, totals.rejected) == (59, 1)
    assert target.tries[9] == 3


def test_a_target_that_is_away_for_a_while_costs_no_attempts(bench):
    away = iter([True] * 4 + [False] * 100)

    def before(tasks):
        if next(away):
            raise TargetUnavailable("restarting")

    target = ScriptedTarget(before=before)
    totals = producer(bench, tasks_of(6), target, max_prompt_attempts=1)()
    assert (totals.refs, totals.rejected) == (6, 0)


def test_a_target_that_stays_away_fails_the_run_by_name(bench):
    def before(tasks):
        if tasks[0].ordinal >= 3:
            raise TargetUnavailable("connection refused")

    drive = producer(bench, tasks_of(6), ScriptedTarget(before=before), unavailable_timeout_s=0.3)
    reader = bench.open_channel()
    with pytest.raises(TargetUnavailable, match="connection refused"):
        drive()
    with pytest.raises(ProducerFailed) as failure:
        list(reader.stream())
    assert failure.value.failure_class == "target_unavailable"


class NoPuts:
    """A native store client whose every put fails."""

    def __init__(self, client):
        self._client = client

    def __getattr__(self, name):
        return getattr(self._client, name)

    def put_from(self, *args):
        return -900

    def batch_put_from(self, keys, *args):
        return [-900] * len(keys)


def test_puts_that_all_fail_are_a_failure_and_no_short_run(bench, endpoints):
    with MooncakeFeatureStore(
        endpoints, namespace=bench.store.namespace, retry_timeout_s=0.3, put_timeout_s=0.3, wrap=NoPuts
    ) as broken:
        drive = producer(bench, tasks_of(20), ScriptedTarget(batch_size=4), store=broken)
        with pytest.raises(StoreError):
            drive()
    with pytest.raises(ProducerFailed) as failure:
        list(bench.open_channel().stream())
    assert failure.value.failure_class == "store_lost"


def test_the_producer_stops_when_the_consumer_is_done(bench):
    drive = producer(bench, tasks_of(500), ScriptedTarget(batch_size=4), window=2, high_watermark_refs=8)
    channel = bench.open_channel()
    with Consumer(channel, bench.store, window=2, stop_after=10) as consumer:
        began = time.monotonic()
        totals = drive()
    assert time.monotonic() - began < 20
    assert len(consumer.ordinals) == 10
    assert 10 <= totals.refs <= 18
    assert totals.prompts == totals.refs + totals.rejected
    assert bench.store.key_count() == totals.refs - 10, "what was stored and not published is freed"


def test_the_producer_stops_when_the_consumer_has_failed(bench):
    drive = producer(bench, tasks_of(500), ScriptedTarget(batch_size=4), high_watermark_refs=8)
    channel = bench.open_channel()
    with (
        Consumer(channel, bench.store, stop_after=4, how=lambda ch: ch.abandon("loss is NaN")),
        pytest.raises(RoleFailed, match="loss is NaN"),
    ):
        drive()


def test_an_error_in_our_own_code_ends_the_stream_with_its_reason(bench):
    def before(tasks):
        if tasks[0].ordinal == 3:
            raise ZeroDivisionError("oops")

    with pytest.raises(ZeroDivisionError):
        producer(bench, tasks_of(6), ScriptedTarget(before=before))()
    with pytest.raises(ProducerFailed, match="ZeroDivisionError: oops"):
        list(bench.open_channel().stream())
    assert bench.store.key_count() <= 3


def test_a_stop_request_ends_the_stream_as_preempted(bench):
    drive = producer(bench, tasks_of(500), ScriptedTarget(), high_watermark_refs=8)
    threading.Timer(0.3, drive.request_stop, ["SIGTERM"]).start()
    with pytest.raises(Preempted):
        drive()
    with pytest.raises(ProducerFailed) as failure:
        list(bench.open_channel().stream())
    assert failure.value.failure_class == "preempted"


def test_a_worker_that_hangs_loses_its_prompt_to_another_one(bench):
    released = threading.Event()
    hung = []

    def before(tasks):
        if tasks[0].ordinal == 2 and not hung:
            hung.append(tasks)
            released.wait(20)

    target = ScriptedTarget(before=before, concurrency=2)
    source = PromptSource.of_tasks(tasks_of(8), lease_s=0.5)
    drive = producer(bench, source, target)
    watch = bench.open_channel()

    def release_when_others_are_done():
        deadline = time.monotonic() + 15
        while watch.published < 8 and time.monotonic() < deadline:
            released.wait(0.05)
        released.set()

    threading.Thread(target=release_when_others_are_done, daemon=True).start()
    totals = drive()

    assert totals.refs == 8
    assert target.tries[2] == 2
    assert bench.store.key_count() == 8, "the late capture is freed"


class Mount:
    """A channel's backend on a mount that is away for as long as `away` is set; everything of it fails then."""

    def __init__(self, backend):
        self._backend = backend
        self.away = threading.Event()
        self.refused = Counter()

    def __getattr__(self, name):
        found = getattr(self._backend, name)
        if not callable(found):
            return found

        def call(*args, **kwargs):
            if self.away.is_set():
                self.refused[name] += 1
                raise ChannelUnavailable("stale file handle")
            return found(*args, **kwargs)

        return call


@pytest.fixture
def mount(bench):
    return Mount(FileBackend(bench.path / "channel", run_id=bench.identity.run_id, attempt=1))


def test_a_consumer_that_was_killed_counts_as_preempted(bench):
    bench.open_channel(process=dead_process()).claim_reader()
    with pytest.raises(RoleFailed, match=r"stopped because the consumer .* is lost") as failed:
        producer(bench, tasks_of(60), ScriptedTarget(), high_watermark_refs=8)()
    assert failed.value.failure_class == "preempted"


def test_a_mount_that_is_away_for_a_moment_costs_nothing(bench, mount):
    drive = producer(
        bench, tasks_of(60), ScriptedTarget(), high_watermark_refs=8, channel=bench.open_channel(backend=mount)
    )
    told = []

    def hiccup():
        if len(told) == 3:
            mount.away.set()
            eventually(lambda: mount.refused["load_cursor"] >= 4)
            mount.away.clear()
        told.append(True)

    with Consumer(bench.open_channel(), bench.store, before_ack=hiccup) as consumer:
        totals = drive()

    assert mount.refused
    assert (totals.refs, totals.rejected) == (60, 0)
    assert consumer.ordinals == list(range(60))
    assert bench.store.key_count() == 0


def test_a_stop_request_is_heard_while_the_mount_is_away(bench, mount):
    drive = producer(
        bench, tasks_of(60), ScriptedTarget(), high_watermark_refs=8, channel=bench.open_channel(backend=mount)
    )

    failures = []

    def run():
        try:
            drive()
        except Preempted as error:
            failures.append(error)

    running = threading.Thread(target=run)
    running.start()
    eventually(lambda: drive.state().published == 8)
    mount.away.set()
    eventually(lambda: mount.refused["load_cursor"] >= 2)
    drive.request_stop("SIGTERM")
    running.join(60)
    mount.away.clear()

    assert not running.is_alive()
    assert [str(error) for error in failures] == ["SIGTERM"]
