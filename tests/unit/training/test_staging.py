"""How samples that arrive become batches in the background: in order, one window ahead, stopped and failing cleanly."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor

from disagg_core.contracts import SCHEMA_VERSION, SampleRef
from disagg_core.drafts.method import Sample
from disagg_core.errors import BadInput, SampleLost, StoreUnavailable
from disagg_core.training.distributed import Ranks
from disagg_core.training.inputs import DraftInput
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.staging import PendingWindow, Stager
from tests.contract.drafts.kit import SEED, Case

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")


def ref(sample: Sample) -> SampleRef:
    return SampleRef(
        sample_id=sample.sample_id,
        run_id="r",
        attempt=1,
        source_task_id="t",
        feature_store_uri="mooncake://",
        key=sample.sample_id,
        size_bytes=1,
        crc32=None,
        feature_specs={},
        strategy="eagle3",
        schema_version=SCHEMA_VERSION,
        target_model_version="",
        draft_weight_version=0,
        tokenizer_version="",
        vocab_map_version="",
        num_tokens=len(sample),
    )


class Arrivals:
    """Transfers of samples that end when they are told to."""

    def __init__(self) -> None:
        self.case = Case.of("eagle3")
        self.inputs = [DraftInput(self.case.method.batcher(self.case.options, self.case.config, seed=SEED))]
        self.transfers: dict[str, Future[dict[str, Tensor]]] = {}

    def samples(self, *ordinals: int) -> list[Sample]:
        return [self.case.sample(ordinal, 12 + ordinal) for ordinal in ordinals]

    def window(self, *micro_batches: tuple[int, ...]) -> PendingWindow:
        """A window whose samples have not come."""
        shares = []
        for ordinals in micro_batches:
            samples = self.samples(*ordinals)
            for sample in samples:
                self.transfers[sample.sample_id] = Future()
            shares.append([(ref(sample), self.transfers[sample.sample_id]) for sample in samples])
        return PendingWindow([known for share in shares for known, _ in share], shares)

    def submit_get(self, known: SampleRef) -> Future[dict[str, Tensor]]:
        """Stand for the store of a loader."""
        return self.transfers.setdefault(known.sample_id, Future())

    def arrive(self, *ordinals: int) -> None:
        for sample in self.samples(*ordinals):
            self.transfers[sample.sample_id].set_result(dict(sample.tensors))

    def fail(self, ordinal: int, error: BaseException) -> None:
        self.transfers[self.samples(ordinal)[0].sample_id].set_exception(error)


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("staging")]


def test_a_window_is_staged_when_all_its_samples_are_there() -> None:
    arrivals = Arrivals()
    window, stager = arrivals.window((0, 1), (2,)), Stager(arrivals.inputs, CPU)
    stager.stage(window)
    arrivals.arrive(0, 1)
    assert window.staged is not None
    assert window.unfinished() == 2  # a transfer, and the staging itself

    arrivals.arrive(2)
    made = window.staged.result(timeout=60)

    assert [None if batch is None else batch.input_ids.shape[1] for batch in made.drafts[0].batches] == [25, 14]
    assert made.tokens == 39
    assert made.samples == 3
    assert window.unfinished() == 0
    stager.close()


def test_windows_are_staged_in_the_order_they_are_asked_for() -> None:
    arrivals = Arrivals()
    first, second = arrivals.window((0,)), arrivals.window((1,))
    stager, order = Stager(arrivals.inputs, CPU), []
    for number, window in enumerate((first, second)):
        stager.stage(window)
        assert window.staged is not None
        window.staged.add_done_callback(lambda _, number=number: order.append(number))

    arrivals.arrive(1)
    arrivals.arrive(0)
    assert second.staged is not None
    second.staged.result(timeout=60)

    assert order == [0, 1]
    stager.close()


def test_what_a_sample_ended_with_is_told_apart_from_what_the_store_ended_with() -> None:
    arrivals = Arrivals()
    lost, broken, stager = arrivals.window((0, 1)), arrivals.window((2,)), Stager(arrivals.inputs, CPU)
    stager.stage(lost)
    stager.stage(broken)
    arrivals.fail(0, SampleLost("gone"))
    arrivals.arrive(1)
    arrivals.fail(2, StoreUnavailable("away"))

    assert lost.staged is not None
    assert broken.staged is not None
    made = lost.staged.result(timeout=60)

    assert [(item.reason, item.lost) for item in made.given_up] == [("gone", True)]
    assert made.samples == 1
    assert lost.broken() is None
    assert isinstance(broken.staged.exception(timeout=60), StoreUnavailable)
    assert isinstance(broken.broken(), StoreUnavailable)
    stager.close()


def test_a_wait_for_samples_that_never_come_ends_with_the_stager() -> None:
    arrivals = Arrivals()
    window, stager = arrivals.window((0,)), Stager(arrivals.inputs, CPU)
    before = set(staging_threads())
    stager.stage(window)

    stager.close()

    assert window.staged is not None
    assert window.staged.exception(timeout=60) is not None
    for thread in set(staging_threads()) - before:
        thread.join(60)
        assert not thread.is_alive()


# --- behind the loader -----------------------------------------------------------------------------------------------


class Queue:
    """References that are there at once; then the stream ends, unless it stays open."""

    def __init__(self, refs: list[SampleRef], *, ended: bool = True) -> None:
        self._refs, self._ended = refs, ended

    def get(self, count: int, timeout: float | None = None) -> list[SampleRef]:
        given, self._refs = self._refs[:count], self._refs[count:]
        if not given and not self._ended:
            raise TimeoutError
        return given


def loader_of(arrivals: Arrivals, *ordinals: int, **options: Any) -> FeatureDataLoader:
    queue: Any = Queue([ref(sample) for sample in arrivals.samples(*ordinals)])
    store: Any = arrivals
    ranks = Ranks(0, 1, CPU, owns_group=False, control=None)
    return FeatureDataLoader(queue, store, batch_size=2, ranks=ranks, **{"inputs": arrivals.inputs, **options})


def fetched(arrivals: Arrivals, *ordinals: int) -> None:
    for sample in arrivals.samples(*ordinals):
        arrivals.transfers[sample.sample_id] = Future()
    arrivals.arrive(*ordinals)


def test_the_next_window_is_made_while_one_is_trained_and_no_other() -> None:
    arrivals = Arrivals()
    fetched(arrivals, *range(6))
    loader = loader_of(arrivals, *range(6))

    window = next(iter(loader))

    ahead = list(loader._pending)
    assert [len(pending.refs) for pending in ahead] == [2, 2]
    assert ahead[0].staged is not None
    assert len(ahead[0].staged.result(timeout=60).refs) == 2  # nobody has asked for it
    assert ahead[1].staged is None
    assert [known.sample_id for known in window.refs] == [sample.sample_id for sample in arrivals.samples(0, 1)]
    loader.close()


def test_windows_come_in_the_published_order_with_their_samples() -> None:
    arrivals = Arrivals()
    fetched(arrivals, *range(7))
    loader = loader_of(arrivals, *range(7))

    tokens = [window.tokens for window in loader]

    assert tokens == [12 + 13, 14 + 15, 16 + 17, 18]
    assert loader.end_reason == "end of stream"
    loader.close()


def test_a_batch_that_cannot_be_made_ends_the_iteration_with_its_error() -> None:
    class Refusing(DraftInput):
        def add(self, *_: Any, **__: Any) -> None:
            raise BadInput("these tensors are no sample of this draft")

    arrivals = Arrivals()
    fetched(arrivals, 0, 1)
    loader = loader_of(arrivals, 0, 1, inputs=[Refusing(arrivals.inputs[0].batcher)])

    with pytest.raises(BadInput, match="no sample of this draft"):
        next(iter(loader))
    loader.close()


def test_a_stop_ends_a_wait_for_samples_and_a_wait_for_batches() -> None:
    for arrived in ((), (0, 1)):
        making, let_go = threading.Event(), threading.Event()

        class Slow(DraftInput):
            def add(self, *told: Any, making=making, let_go=let_go, **more: Any) -> None:
                making.set()
                assert let_go.wait(60)
                super().add(*told, **more)

        arrivals = Arrivals()
        fetched(arrivals, *arrived)
        loader = loader_of(arrivals, 0, 1, inputs=[Slow(arrivals.inputs[0].batcher)])

        def stop(loader=loader, making=making, arrived=arrived) -> None:
            assert not arrived or making.wait(60)
            loader.request_stop()

        stopper = threading.Thread(target=stop)
        stopper.start()
        assert list(loader) == []
        assert loader.end_reason == "stop requested"
        let_go.set()
        stopper.join(60)
        loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_staged_window_is_on_the_gpu_by_way_of_pinned_memory() -> None:
    arrivals, device = Arrivals(), torch.device("cuda", 0)
    window, stager = arrivals.window((0, 1), ()), Stager(arrivals.inputs, device)
    arrivals.arrive(0, 1)
    stager.stage(window)
    assert window.staged is not None

    batches = window.staged.result(timeout=60).drafts[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches.join()
        sums = [tensor.double().sum() for tensor in batches.batches[0].moved()]
    finally:
        torch.cuda.set_sync_debug_mode("default")

    expected = arrivals.inputs[0].batcher.collate(arrivals.samples(0, 1), packed=True, pin=True)
    assert all(tensor.is_pinned() for tensor in expected.moved())
    assert [float(found) for found in sums] == pytest.approx([float(x.double().sum()) for x in expected.moved()])
    assert batches.batches[1] is None
    stager.close()
