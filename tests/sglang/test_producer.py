"""The producer over real servers that die, hang, or are killed by a prompt: every prompt is accounted for once."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import PromptTask, SampleRef, StreamTotals
from disagg_core.engines.sglang.target import SGLangTarget
from disagg_core.rollout import build_disagg_online_producer
from disagg_core.rollout.producer import Drive
from disagg_core.run_spec.document import RolloutSection, StoreSection, TargetSection
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore
from disagg_core.target.facts import read_target_facts
from tests.kit.waiting import eventually
from tests.sglang.support import (
    CAPTURE,
    MAX_TOKENS,
    START_TIMEOUT_S,
    VOCABULARY,
    identity_of,
    random_tokens,
    task_of,
)

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]


class Consumer:
    """Reads the stream to its end in a thread, checks that each sample is there, acknowledges and frees it."""

    def __init__(self, channel: StreamingRefChannel, store: MooncakeFeatureStore) -> None:
        self.refs: list[SampleRef] = []
        self._channel, self._store = channel, store
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for ref in self._channel.stream():
            assert self._store.get(ref)["input_ids"].shape == (ref.num_tokens,)
            self._channel.ack([ref], step=len(self.refs))
            self._store.release(ref)
            self.refs.append(ref)

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def producing(
    target: SGLangTarget, tasks: list[PromptTask], store: MooncakeFeatureStore, directory: Path, attempts: int
) -> Iterator[tuple[Drive, Consumer]]:
    identity = identity_of(target._facts, store)
    target.prepare(identity)
    run_id = identity.run_id
    with (
        StreamingRefChannel(directory, run_id=run_id, attempt=1) as writer,
        StreamingRefChannel(directory, run_id=run_id, attempt=1) as reader,
    ):
        _, drive = build_disagg_online_producer(
            prompts=tasks,
            target=target,
            store=store,
            channel=writer,
            identity=identity,
            rollout=RolloutSection(max_prompt_attempts=attempts, high_watermark_refs=64),
            window=4,
            unavailable_timeout_s=START_TIMEOUT_S,
        )
        consumer = Consumer(reader, store)
        yield drive, consumer
        consumer.join()


@pytest.fixture
def managed_target(
    model_of: Callable[[str], Path], store: MooncakeFeatureStore, tmp_path: Path
) -> Iterator[Callable[..., SGLangTarget]]:
    """Make targets that start servers of their own; they are closed after the test."""
    made: list[SGLangTarget] = []

    def make(kind: type[SGLangTarget] = SGLangTarget, **changes: object) -> SGLangTarget:
        section = TargetSection(
            model=str(model_of("llama")),
            backend="sglang",
            dtype="float32",
            device="cpu",
            server_concurrency=4,
            unavailable_timeout_s=START_TIMEOUT_S,
            **changes,
        )
        target = kind(
            section,
            read_target_facts(section),
            CAPTURE,
            store=store,
            store_section=StoreSection(),
            max_tokens=MAX_TOKENS,
            log_dir=tmp_path / "logs",
            settings=get_settings(),
            health_timeout_s=10.0,
        )
        made.append(target)
        return target

    yield make
    for target in made:
        target.close()


def events_of(target: SGLangTarget, name: str) -> str:
    """What happened to a server, in words."""
    return "; ".join({server.name: server.events for server in target.health()}[name])


def server_pid(target: SGLangTarget, name: str) -> int:
    members = target._prepared()._members
    pid = members[name].managed.pid
    assert pid is not None
    return pid


def test_one_of_three_servers_is_killed_and_one_hangs(
    managed_target: Callable[..., SGLangTarget], store: MooncakeFeatureStore, tmp_path: Path
) -> None:
    tasks = [task_of(ordinal, random_tokens(20 + ordinal % 60, seed=ordinal)) for ordinal in range(600)]
    target = managed_target(servers=3, request_timeout_s=15.0)
    with producing(target, tasks, store, tmp_path / "channel", attempts=4) as (drive, consumer):
        ended: list[StreamTotals] = []
        driving = threading.Thread(target=lambda: ended.append(drive()))
        driving.start()
        eventually(lambda: len(consumer.refs) >= 60, "the first samples")
        os.killpg(server_pid(target, "sglang-0"), signal.SIGKILL)
        os.killpg(server_pid(target, "sglang-1"), signal.SIGSTOP)
        driving.join(600)
        assert not driving.is_alive()
        # the other servers may be through before the health check of the hung one is
        eventually(lambda: "hangs" in events_of(target, "sglang-1"), "the hung server is found out")

    [totals] = ended
    assert Counter(ref.sample_id for ref in consumer.refs) == Counter(task.sample_id for task in tasks)
    assert (totals.prompts, totals.refs, totals.rejected) == (600, 600, 0)
    assert "died: killed by SIGKILL" in events_of(target, "sglang-0")
    assert "hangs: no good answer to a health check of 10 s" in events_of(target, "sglang-1")
    assert {server.name: server.restarts for server in target.health()}["sglang-2"] == 0
    assert store.key_count() == 0


class Unchecked(SGLangTarget):
    """Lets a prompt through that the real target would have refused, so that it reaches the server and kills it."""

    def _check_task(self, task: PromptTask) -> None:
        return


@pytest.mark.slow
def test_a_prompt_that_kills_its_server_each_time_is_quarantined(
    managed_target: Callable[..., SGLangTarget], store: MooncakeFeatureStore, tmp_path: Path
) -> None:
    tasks = [task_of(ordinal, random_tokens(30, seed=ordinal)) for ordinal in range(40)]
    tasks[20] = task_of(20, [5, 6, VOCABULARY + 1000, 7])
    target = managed_target(Unchecked, servers=1, request_timeout_s=30.0)
    with producing(target, tasks, store, tmp_path / "channel", attempts=2) as (drive, consumer):
        totals = drive()
        [server] = target.health()

    rejected = {task.sample_id for task in tasks} - {ref.sample_id for ref in consumer.refs}
    assert tasks[20].sample_id in rejected
    assert totals.prompts == 40 == totals.refs + totals.rejected
    assert len(consumer.refs) == totals.refs == 40 - len(rejected)
    assert server.restarts >= 2
    assert store.key_count() == 0
