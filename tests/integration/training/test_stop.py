"""A request to stop reaches a trainer within two seconds, whatever it waits for, also where a server is away."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from disagg_core.errors import Preempted
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.checkpoint import covered_ordinals
from disagg_core.training.distributed import Ranks
from disagg_core.training.trainer import StepObserver
from tests.integration.channel.away import How, leaving_redis
from tests.integration.training.consumer_kit import Attempt, consumer

pytestmark = pytest.mark.integration

WITHIN_S = 2.0
DEEP_S = 0.7
"""So long after the server is gone the trainer is in the middle of its retries."""


class AtFirstWait(StepObserver):
    """Does something when the trainer first waits for references."""

    def __init__(self, do) -> None:
        self._do = do

    def on_wait(self) -> None:
        self._do()


@pytest.mark.parametrize("how", ["ended", "silent"])
@pytest.mark.parametrize(("wait", "trained"), [("poll", 8), ("ack", 8), ("finish", 8)])
def test_a_stop_is_heard_while_the_channel_is_away(
    endpoints: StoreEndpoints, tmp_path: Path, run_id: str, wait: str, trained: int, how: How
) -> None:
    gone = threading.Event()
    with (
        Ranks.join("cpu") as ranks,
        leaving_redis(tmp_path) as server,
        Attempt(endpoints, tmp_path, run_id, url=server.url) as attempt,
    ):
        attempt.publish(range(8), ended=wait == "finish")
        trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path / "c")

        def leave() -> None:
            if not gone.is_set():
                server.leave(how)
                gone.set()

        if wait == "poll":
            trainer._observer = AtFirstWait(leave)
        elif wait == "ack":
            step = trainer.trainees[0].step
            run = step.run
            step.run = lambda *window, **counts: (run(*window, **counts), trainer.progress.step == 1 and leave())[0]
        else:
            finish = loader.finish
            loader.finish = lambda reason: (leave(), finish(reason))[1]
        asked: list[float] = []

        def stop() -> None:
            gone.wait(60)
            threading.Event().wait(DEEP_S)
            asked.append(time.monotonic())
            loader.request_stop()

        heard: list[float] = []
        abandon = loader.abandon
        loader.abandon = lambda *why: (heard.append(time.monotonic()), abandon(*why))[1]
        stopper = threading.Thread(target=stop)
        stopper.start()
        with pytest.raises(Preempted):
            trainer.fit(loader)
        stopper.join()

    assert heard[0] - asked[0] < WITHIN_S, "the producer is told last, with one try"
    assert len(covered_ordinals(tmp_path / "c")) == trained
