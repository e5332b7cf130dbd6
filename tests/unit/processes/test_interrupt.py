"""A stop reaches a thread wherever it computes or waits."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from disagg_core.channel.redis.backend import RedisBackend
from disagg_core.contracts import PromptTask
from disagg_core.engines.generation import Sampling, continue_tasks
from disagg_core.errors import Preempted
from disagg_core.processes.interrupt import check_interrupt, interruptible
from disagg_core.processes.tree import free_port
from disagg_core.rollout.worker import RolloutWorker
from disagg_core.training.distributed import Ranks
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.staging import PendingWindow

pytestmark = pytest.mark.unit


class Asked:
    """Says stop from the `after`-th question on."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise Preempted("asked to stop")


def test_a_thread_is_asked_only_inside_and_only_its_own_questions() -> None:
    with interruptible(Asked(1)):
        with ThreadPoolExecutor(1) as other:
            other.submit(check_interrupt).result()
        with interruptible(lambda: None):
            check_interrupt()
        with pytest.raises(Preempted):
            check_interrupt()
    check_interrupt()


def test_decoding_ends_at_the_next_token() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, max_position_embeddings=4096, **sizes)).eval()
    tasks = [PromptTask(ordinal=0, source="", input_ids=[1, 2, 3], loss_mask=[0, 0, 0])]
    sampling = Sampling(max_new_tokens=4000, max_tokens=4096, temperature=0.0, top_p=1.0, seed=0)

    with interruptible(asked := Asked(3)), pytest.raises(Preempted):
        continue_tasks(model, tasks, sampling, eos_token_ids=(), device=torch.device("cpu"))
    assert asked.left == 0


def test_a_worker_whose_pipeline_stops_leaves_the_batch_and_gives_its_leases_back() -> None:
    class Pipeline:
        stopping = False
        changed = threading.Condition()
        returned: list[str] = []
        error: BaseException | None = None

        def next_batch(self, name):
            return None if self.stopping else Batch

        def given_back(self, lease):
            self.returned.append(lease)

        def stop(self, error):
            self.error = error

    class Batch:
        leases = {0: "lease"}
        tasks: list[PromptTask] = []
        avoid: dict[int, frozenset[str]] = {}

    class Generating:
        def capture(self, tasks, *, avoid):
            started.set()
            for _ in range(6000):
                check_interrupt()
                threading.Event().wait(0.01)
            yield from ()

    started, pipeline = threading.Event(), Pipeline()
    worker = RolloutWorker(
        "w", pipeline=pipeline, target=Generating(), putters=None, store=None, meter=None, unavailable_timeout_s=1
    )
    thread = threading.Thread(target=worker.run, daemon=True)
    thread.start()
    assert started.wait(60)
    pipeline.stopping = True
    thread.join(60)
    assert not thread.is_alive()
    assert (pipeline.returned, pipeline.error) == (["lease"], None)


def test_a_redis_server_that_is_away_does_not_keep_a_stop_waiting() -> None:
    url = f"redis://127.0.0.1:{free_port('127.0.0.1')}/0"
    backend = RedisBackend(url, run_id="r", attempt=1, reconnect_s=3600)
    with interruptible(Asked(3)), pytest.raises(Preempted):
        backend.read_claim("writer")


def test_a_stop_of_another_rank_ends_the_wait_for_samples_that_only_this_rank_lacks() -> None:
    class TwoRanks(Ranks):
        def sum(self, values):
            return [mine + other for mine, other in zip(values, [0.0, 1.0], strict=True)]

    ranks = TwoRanks(1, 2, torch.device("cpu"), owns_group=False, control=None)
    loader = FeatureDataLoader(None, None, inputs=[], batch_size=1, ranks=ranks)
    never: Future = Future()

    with ThreadPoolExecutor(1) as waiter:
        arrived = waiter.submit(loader._arrived, PendingWindow([], [[(None, never)]]))
        try:
            assert arrived.result(timeout=60) is False
        finally:
            never.cancel()
