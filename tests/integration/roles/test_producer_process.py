"""The producer as a process: killed in the middle and started again, or asked to stop."""

from __future__ import annotations

import os
import signal
from multiprocessing.context import ForkServerProcess

import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.errors import ProducerFailed
from disagg_core.run.outcomes import PREEMPTED_EXIT_CODE, read_outcome
from disagg_core.store import MooncakeFeatureStore
from tests.integration.forks import end, forked
from tests.integration.rollout.rollout_kit import Consumer
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

SLOW = {"data": {"generate": {"max_new_tokens": 40}}, "rollout": {"batch_tokens": 256, "high_watermark_refs": 8}}


@pytest.fixture
def start(tmp_path):
    """Start producer processes; those that still run at the end are killed."""
    started = []

    def start(assignment) -> ForkServerProcess:
        document = tmp_path / "producer.json"
        document.write_text(assignment.model_dump_json())
        started.append(forked("disagg_core.roles.producer", [str(document)], tmp_path / "producer.log"))
        return started[-1]

    yield start
    for process in started:
        end(process)


def exit_code(process: ForkServerProcess, within_s: float) -> int | None:
    process.join(within_s)
    return process.exitcode


def open_channel(assignment) -> StreamingRefChannel:
    return StreamingRefChannel(assignment.channel_url, run_id=assignment.plan.run_id, attempt=assignment.attempt)


def test_a_killed_producer_is_started_again_and_nothing_is_lost_or_doubled(make_assignment, start):
    assignment = make_assignment(40, **SLOW)
    with (
        MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store,
        open_channel(assignment) as channel,
        open_channel(assignment) as watch,
    ):
        with Consumer(channel, store, window=2) as consumer:
            process = start(assignment)
            eventually(lambda: watch.published >= 9, process)
            end(process)
            assert exit_code(start(assignment), 120) == 0
        assert consumer.error is None
        assert consumer.ordinals == list(range(40))
        assert (channel.totals.refs, channel.totals.prompts) == (40, 40)
        assert store.key_count() == 0


def test_a_producer_that_is_asked_to_stop_says_so_in_the_stream(make_assignment, start):
    assignment = make_assignment(40, **SLOW)
    with (
        MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store,
        open_channel(assignment) as watch,
    ):
        process = start(assignment)
        eventually(lambda: watch.published >= 1, alive=process.is_alive)
        os.kill(process.pid, signal.SIGTERM)
        assert exit_code(process, 30) == PREEMPTED_EXIT_CODE
        with pytest.raises(ProducerFailed) as failure:
            list(watch.stream())
        assert failure.value.failure_class == "preempted"
        outcome = read_outcome(assignment.dir.state / "producer-outcome.json")
        assert (outcome.state, outcome.failure_class) == ("failed", "preempted")
        assert store.key_count() == watch.published, "what was stored and not published is freed"
        store.sweep()
