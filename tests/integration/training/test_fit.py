"""One rank trains a stream: what is acknowledged, freed, counted, saved and continued."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from disagg_core.channel import patience as patience_module
from disagg_core.contracts import StreamTotals, sample_id_of
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.errors import (
    ChannelBusy,
    ChannelUnavailable,
    Preempted,
    ProducerFailed,
    StoreUnavailable,
    TrainingDiverged,
)
from disagg_core.run.metrics import read_metrics
from disagg_core.run.phases import TRAINING_PHASES, seconds_of
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training import loader as loader_module
from disagg_core.training.checkpoint import covered_ordinals, newest_complete, read_state
from disagg_core.training.distributed import Ranks
from disagg_core.training.observers import GivenUpObserver, LapObserver, MetricsObserver, Observers
from disagg_core.training.trainer import StepObserver
from tests.integration.channel.away import leaving_redis
from tests.integration.training.consumer_kit import Attempt, consumer, end, sample, section, store_samples
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration


@pytest.fixture
def attempt(endpoints, tmp_path, run_id):
    with Attempt(endpoints, tmp_path, run_id) as opened:
        yield opened


@pytest.fixture
def ranks():
    with Ranks.join("cpu") as joined:
        yield joined


def test_every_sample_is_trained_acknowledged_and_freed(attempt, ranks, tmp_path):
    attempt.publish(range(10))
    observer = MetricsObserver(tmp_path / "train.jsonl")
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, observer=observer)

    outcome = trainer.fit(loader)

    assert (outcome.reason, outcome.steps, outcome.samples) == ("end of stream", 3, 10)
    assert (outcome.quarantined, outcome.lost, outcome.unused) == (0, 0, 0)
    assert outcome.samples_per_second > 0
    assert attempt.writer.in_flight_remote() == 0
    assert attempt.writer.reader_status().state == "done"
    assert attempt.store.key_count() == 0
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [record["samples"] for record in records] == [4, 4, 2]
    assert [record["in_flight"] for record in records] == [6, 2, 0]
    assert records[0]["loss"] == outcome.drafts[""].loss_first
    assert records[-1]["loss"] == outcome.drafts[""].loss_last
    assert len(records[0]["step_losses"]) == len(records[0]["accuracies"]) == len(records[0]["acceptance_rates"]) == 3


def test_the_wait_for_the_first_window_is_none_of_training(attempt, ranks):
    late = threading.Timer(1.5, attempt.publish, [range(4)])
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    late.start()

    outcome = trainer.fit(loader)

    assert outcome.steps == 1
    assert outcome.data_wait_s <= outcome.seconds


def test_where_the_time_of_every_window_went_is_a_line_of_the_metrics_and_adds_up(attempt, ranks, tmp_path):
    attempt.publish(range(10))
    observer = Observers(MetricsObserver(tmp_path / "train.jsonl"), LapObserver(tmp_path / "phases.jsonl"))
    training = section(save_every_steps=2)
    trainer, loader = consumer(
        attempt.reader, attempt.store, ranks, observer=observer, training=training, checkpoints=tmp_path
    )

    outcome = trainer.fit(loader)

    laps = list(read_metrics(tmp_path / "phases.jsonl"))
    assert [(lap["step"], lap["samples"]) for lap in laps] == [(1, 4), (2, 4), (3, 2)]
    spent = [seconds_of(lap, TRAINING_PHASES) for lap in laps]
    assert sum(sum(phases.values()) for phases in spent) <= outcome.seconds
    for phases in spent:
        assert all(phases[phase] > 0 for phase in ("forward", "backward", "reduce", "optimizer", "ack"))
    assert spent[1]["features"] > 0
    assert [phases["save"] > 0 for phases in spent] == [False, True, False]


def test_what_fsdp_does_when_the_gradients_are_there_is_counted_as_reduction(attempt, ranks, monkeypatch):
    attempt.publish(range(4))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    entered = []
    reduced = FSDPParamGroup.post_backward

    def noted(group, *unused):
        entered.append(trainer._clock._entered[-1][0])
        return reduced(group, *unused)

    monkeypatch.setattr(FSDPParamGroup, "post_backward", noted)
    trainer.fit(loader)

    assert entered == ["backward", "reduce"], "of two micro-batches the last one's gradients are reduced"


def test_samples_are_freed_after_the_step_and_not_when_read(attempt, ranks, monkeypatch):
    attempt.publish(range(8))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    left, acknowledged_first = [], []
    release_many = attempt.store.release_many

    def noted(refs):
        acknowledged_first.append((attempt.store.key_count(), attempt.writer.in_flight_remote()))
        release_many(refs)

    def stored_and_in_flight() -> tuple[int, int]:
        return attempt.store.key_count(), attempt.writer.in_flight_remote()

    class Watcher(StepObserver):
        def on_step(self, record):
            eventually(lambda: stored_and_in_flight() == (record["in_flight"], record["in_flight"]))
            left.append(stored_and_in_flight())

    run = trainer.trainees[0].step.run
    trainer.trainees[0].step.run = lambda window, step, **counts: (
        left.append(stored_and_in_flight()),
        run(window, step, **counts),
    )[1]
    monkeypatch.setattr(attempt.store, "release_many", noted)
    trainer._observer = Watcher()
    trainer.fit(loader)

    assert left == [(8, 8), (4, 4), (4, 4), (0, 0)]
    assert acknowledged_first == [(8, 4), (4, 0)], "a sample is removed when its window is acknowledged, not before"


def test_windows_of_accumulated_micro_batches_are_one_big_batch(attempt, endpoints, ranks, tmp_path, run_id):
    """In the `valid` normalisation neither padding nor the cut into micro-batches changes the weights."""
    attempt.publish(range(12))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=section())
    trainer.fit(loader)
    expected = trainer.trainees[0].weights()
    for number, cut in (
        (2, {"batch_size": 4, "accumulation_steps": 1}),
        (3, {"batch_size": 1, "accumulation_steps": 4}),
    ):
        with Attempt(endpoints, tmp_path, run_id, number) as other:
            other.publish(range(12))
            again, loader = consumer(other.reader, other.store, ranks, training=section(**cut))
            again.fit(loader)
        for name, weight in again.trainees[0].weights().items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "read"),
    [({}, 12), ({"prefetch_samples": 8}, 12), ({"prefetch_samples": 4}, 8), ({"prefetch_samples": 1}, 4)],
)
def test_no_more_is_fetched_ahead_than_allowed(attempt, ranks, bounds, read):
    """With the first window in hand, at most `prefetch_samples` of the next ones have been asked for."""
    attempt.publish(range(12))
    _trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=section(**bounds))

    next(iter(loader))

    assert attempt.reader.delivered == read
    loader.close()


def test_bytes_bound_what_is_fetched_ahead_too(attempt, ranks):
    refs = attempt.publish(range(40))
    _trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    loader._prefetch_bytes = sum(ref.size_bytes for ref in refs[4:9])

    next(iter(loader))

    assert attempt.reader.delivered == 12
    loader.close()


def test_bf16_computes_on_fp32_masters(attempt, ranks):
    attempt.publish(range(8))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=section(precision="bfloat16"))

    outcome = trainer.fit(loader)

    assert outcome.steps == 2
    weights = trainer.trainees[0].weights()
    assert weights["fc.weight"].dtype == torch.float32
    assert not torch.equal(weights["fc.weight"], weights["fc.weight"].bfloat16().float())


def test_activations_computed_again_give_the_same_weights(attempt, endpoints, ranks, tmp_path, run_id):
    attempt.publish(range(8))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    trainer.fit(loader)
    with Attempt(endpoints, tmp_path, run_id, 2) as other:
        other.publish(range(8))
        training = section(activation_checkpointing=True)
        again, loader = consumer(other.reader, other.store, ranks, training=training)
        again.fit(loader)

    expected = trainer.trainees[0].weights()
    assert all(torch.equal(weight, expected[name]) for name, weight in again.trainees[0].weights().items())


def test_a_lost_sample_weighs_zero_and_is_quarantined_with_its_reason(attempt, ranks, tmp_path):
    refs = attempt.publish(range(8))
    for ref in (refs[1], refs[6]):
        attempt.store.abort(ref)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path / "checkpoints")

    outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.samples, outcome.lost) == (2, 6, 2)
    assert [name for name, _reason in outcome.given_up] == [refs[1].sample_id, refs[6].sample_id]
    assert all(reason for _name, reason in outcome.given_up)
    assert attempt.writer.in_flight_remote() == 0
    assert attempt.store.key_count() == 0
    cursor = read_state(newest_complete(tmp_path / "checkpoints")).cursor
    assert cursor.trained == [(0, 0), (2, 5), (7, 7)]
    assert cursor.quarantined == []


def test_a_window_without_any_sample_left_is_no_step(attempt, ranks):
    refs = attempt.publish(range(8))
    for ref in refs[:4]:
        attempt.store.abort(ref)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)

    outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.samples, outcome.lost) == (1, 4, 4)


def test_at_max_steps_the_rest_is_left_and_counted(attempt, ranks):
    attempt.publish(range(20))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=section(max_steps=3))

    outcome = trainer.fit(loader)

    assert (outcome.reason, outcome.steps, outcome.samples, outcome.unused) == ("max_steps", 3, 12, 8)
    status = attempt.writer.reader_status()
    assert (status.state, status.reason) == ("done", "max_steps")
    assert attempt.writer.in_flight_remote() == 8
    assert attempt.store.sweep() == 8


@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "muon"}, {"optimizer": "muon", "optimizer_offload": True}],
    ids=["adamw", "muon", "muon-offloaded"],
)
def test_an_interrupted_run_ends_with_the_same_bits(endpoints, ranks, tmp_path, run_id, options):
    def how(**further):
        return section(device="auto", **options, **further)

    with Attempt(endpoints, tmp_path, run_id, 1) as whole_run:
        whole_run.publish(range(22))
        trainer, loader = consumer(whole_run.reader, whole_run.store, ranks, checkpoints=tmp_path / "a", training=how())
        trainer.fit(loader)
        expected = trainer.trainees[0].weights()

    with Attempt(endpoints, tmp_path, run_id, 2) as first:
        first.publish(range(22))
        trainer, loader = consumer(
            first.reader, first.store, ranks, checkpoints=tmp_path / "b", training=how(save_every_steps=2)
        )
        run = trainer.trainees[0].step.run
        trainer.trainees[0].step.run = lambda window, step, **counts: (
            run(window, step, **counts) if step < 3 else pytest.fail("killed")
        )
        with pytest.raises(pytest.fail.Exception):
            trainer.fit(loader)
        assert first.writer.reader_status().state == "failed"

    state = read_state(newest_complete(tmp_path / "b"))
    assert state.step == 2
    with Attempt(endpoints, tmp_path, run_id, 3) as second:
        second.publish(i for i in range(22) if i > state.cursor.trained[0][1])
        torch.manual_seed(99)
        trainer, loader = consumer(second.reader, second.store, ranks, checkpoints=tmp_path / "b", training=how())
        outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.steps_here, outcome.samples, outcome.samples_here) == (6, 4, 22, 14)
    assert all(torch.equal(weight, expected[name]) for name, weight in trainer.trainees[0].weights().items())
    files = [(tmp_path / run / "step-6" / "optimizer.safetensors").read_bytes() for run in "ab"]
    assert files[0] == files[1]


def test_what_the_restored_weights_have_seen_is_not_trained_again(endpoints, ranks, tmp_path, run_id):
    with Attempt(endpoints, tmp_path, run_id, 1) as first:
        first.publish(range(8))
        trainer, loader = consumer(first.reader, first.store, ranks, checkpoints=tmp_path / "c")
        trainer.fit(loader)
    with Attempt(endpoints, tmp_path, run_id, 2) as second:
        second.publish(range(4, 16))
        trainer, loader = consumer(second.reader, second.store, ranks, checkpoints=tmp_path / "c")
        outcome = trainer.fit(loader)

        assert (outcome.samples, outcome.samples_here, outcome.steps) == (16, 8, 4)
        assert second.writer.in_flight_remote() == 0
        assert second.store.key_count() == 0


def test_a_stop_request_saves_and_tells_the_producer(attempt, ranks, tmp_path):
    attempt.publish(range(8), ended=False)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path / "c")
    trainer._observer = StopWhen(loader, lambda: attempt.reader.in_flight_remote() == 0)

    with pytest.raises(Preempted):
        trainer.fit(loader)

    status = attempt.writer.reader_status()
    assert (status.state, status.reason) == ("failed", "preempted")
    state = read_state(newest_complete(tmp_path / "c"))
    assert (state.step, state.cursor.trained) == (2, [(0, 7)])


def test_a_window_with_nothing_to_train_on_after_a_checkpoint_is_remembered(endpoints, ranks, tmp_path, run_id):
    """It is acknowledged without a step: the checkpoint of that step must cover it all the same."""
    checkpoints, training = tmp_path / "c", section(save_every_steps=1)
    with Attempt(endpoints, tmp_path, run_id, 1) as first:
        refs = first.stored(range(4))
        refs += store_samples(first.store, first.identity, range(4, 8), masked=True)
        first.writer.publish_many(refs)
        trainer, loader = consumer(first.reader, first.store, ranks, checkpoints=checkpoints, training=training)
        trainer._observer = StopWhen(loader, lambda: first.reader.in_flight_remote() == 0)
        with pytest.raises(Preempted):
            trainer.fit(loader)
    state = read_state(newest_complete(checkpoints))
    assert (state.step, state.samples, state.cursor.trained) == (1, 8, [(0, 7)])

    with Attempt(endpoints, tmp_path, run_id, 2) as second:
        covered = covered_ordinals(checkpoints)
        second.publish([ordinal for ordinal in range(12) if ordinal not in covered])
        trainer, loader = consumer(second.reader, second.store, ranks, checkpoints=checkpoints, training=training)
        outcome = trainer.fit(loader)
        assert (outcome.steps, outcome.samples, outcome.samples_here) == (2, 12, 4)


class StopWhen(StepObserver):
    """Asks the loader to stop as soon as `due` says so while training waits."""

    def __init__(self, loader, due):
        self._loader, self._due = loader, due

    def on_wait(self):
        if self._due():
            self._loader.request_stop()


def test_a_stop_request_does_not_wait_for_a_store_that_is_away(endpoints, ranks, tmp_path, run_id):
    """A sample that the store does not answer for is tried again for minutes; the stop signal must not wait so long."""
    asked = threading.Event()

    class Away:
        """The native client of a store whose owner is gone: every get fails in a way that is tried again."""

        def __init__(self, client):
            self._client = client

        def __getattr__(self, name):
            return getattr(self._client, name)

        def get_into(self, *_):
            asked.set()
            return -800  # TRANSFER_FAIL

    with (
        Attempt(endpoints, tmp_path, run_id) as attempt,
        MooncakeFeatureStore(endpoints, namespace=f"{run_id}/1", retry_timeout_s=3600, wrap=Away) as store,
    ):
        attempt.publish(range(8))
        trainer, loader = consumer(attempt.reader, store, ranks, checkpoints=tmp_path / "c")
        began = []
        stopper = threading.Thread(
            target=lambda: (asked.wait(60), began.append(time.monotonic()), loader.request_stop())
        )
        stopper.start()

        with pytest.raises(Preempted):
            trainer.fit(loader)

        assert time.monotonic() - began[0] < 2.0
        stopper.join()
        assert attempt.writer.reader_status().reason == "preempted"
        assert attempt.writer.in_flight_remote() == 8
    assert newest_complete(tmp_path / "c").name == "step-0"


def test_the_untrained_draft_is_kept_as_step_0(attempt, ranks, tmp_path):
    attempt.publish(range(4 * 4))
    trainer, loader = consumer(
        attempt.reader, attempt.store, ranks, checkpoints=tmp_path, training=section(save_every_steps=1), keep=2
    )
    before = trainer.trainees[0].weights()

    trainer.fit(loader)

    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-0", "step-3", "step-4"]
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "step-0" / "draft.safetensors")
    assert saved.keys() == before.keys()
    assert "embed_tokens.weight" not in saved
    assert {"d2t", "t2d", "fc.weight", "lm_head.weight"} <= saved.keys()
    assert all(torch.equal(saved[name], before[name]) for name in saved)


def test_what_a_failed_producer_left_is_trained_and_saved_first(attempt, ranks, tmp_path):
    attempt.publish(range(4), ended=False)
    attempt.writer.fail("the target ran out of memory", "out_of_memory")
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)

    with pytest.raises(ProducerFailed, match="the target ran out of memory") as caught:
        trainer.fit(loader)

    assert caught.value.failure_class == "out_of_memory"
    assert trainer.progress.step == 1
    assert read_state(newest_complete(tmp_path)).cursor.trained == [(0, 3)]
    assert attempt.writer.reader_status().state == "failed"


def test_an_empty_stream_is_no_training(attempt, ranks):
    attempt.writer.close(StreamTotals(refs=0, bytes=0, prompts=0, rejected=0))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)

    outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.samples, outcome.drafts[""].loss_first) == (0, 0, None)


def test_a_sample_that_is_not_finite_is_quarantined_for_good(attempt, ranks, tmp_path):
    refs = attempt.stored(range(4))
    tensors = sample(4) | {"last_hidden_state": torch.full((10, 16), float("nan"))}
    tensors = {name: tensor[:10] for name, tensor in tensors.items()}
    identity = attempt.identity
    refs.append(attempt.store.put("s000000004", tensors, identity=identity, source_task_id="t", num_tokens=10))
    attempt.writer.publish_many(refs)
    end(attempt.writer, refs)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    trainer._observer = GivenUpObserver(tmp_path / "quarantined.jsonl")

    outcome = trainer.fit(loader)

    assert (outcome.samples, outcome.quarantined, outcome.lost) == (4, 1, 0)
    assert outcome.quarantined_ordinals == [(4, 4)]
    (line,) = read_metrics(tmp_path / "quarantined.jsonl")
    assert (line["ordinal"], line["kind"], line["reason"]) == (4, "quarantined", outcome.given_up[0][1])
    assert outcome.given_up[0][0] == "s000000004"
    assert "last_hidden_state is not finite" in outcome.given_up[0][1]
    assert attempt.store.key_count() == 0
    assert read_state(newest_complete(tmp_path)).cursor.quarantined == [(4, 4)]
    assert covered_ordinals(tmp_path).ranges() == [(0, 4)]


def test_training_that_diverges_ends_before_it_is_saved(attempt, ranks, tmp_path):
    attempt.publish(range(12))
    training = section(learning_rate=1e38, warmup_ratio=0.0)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, training=training, checkpoints=tmp_path)

    with pytest.raises(TrainingDiverged, match="step 1: expected a finite loss and gradient"):
        trainer.fit(loader)

    assert newest_complete(tmp_path).name == "step-0"


@pytest.mark.parametrize("kind", ["lk_alpha", "lk_lambda"])
def test_the_acceptance_losses_train_too(attempt, ranks, kind):
    attempt.publish(range(8))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, loss=LossSection(type=kind))

    outcome = trainer.fit(loader)

    assert outcome.steps == 2
    assert outcome.drafts[""].loss_last is not None


def test_compat_normalisation_divides_by_padding_too(attempt, ranks):
    attempt.publish(range(8))
    loss = LossSection(normalisation="compat", mask_mode="compat")
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, loss=loss)

    assert trainer.fit(loader).steps == 2


def once(error, real):
    """Let the first call of `real` raise `error`."""
    left = [error]

    def call(*arguments, **options):
        if left:
            raise left.pop()
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("method", ["poll", "ack", "quarantine", "in_flight_remote", "finish"])
def test_a_channel_that_is_away_for_a_moment_costs_the_consumer_nothing(attempt, ranks, tmp_path, monkeypatch, method):
    refs = attempt.publish(range(10))
    attempt.store.abort(refs[5])
    away = ChannelUnavailable("the mount is away")
    monkeypatch.setattr(attempt.reader, method, once(away, getattr(attempt.reader, method)))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)

    outcome = trainer.fit(loader)

    assert (outcome.reason, outcome.samples, outcome.lost) == ("end of stream", 9, 1)
    assert attempt.writer.in_flight_remote() == 0


@pytest.mark.parametrize("method", ["poll", "ack"])
def test_a_channel_that_stays_away_ends_the_fit_with_a_checkpoint_of_all_that_was_trained(
    attempt, ranks, tmp_path, monkeypatch, method
):
    attempt.publish(range(12), ended=False)
    monkeypatch.setattr(loader_module, "CHANNEL_AWAY_S", 0.2)
    monkeypatch.setattr(patience_module, "CHANNEL_AWAY_S", 0.2)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    steps = []

    def away(*_arguments, **_options):
        raise ChannelUnavailable("the mount is away")

    class Watcher(StepObserver):
        def on_step(self, record):
            steps.append(record["step"])
            monkeypatch.setattr(attempt.reader, method, away)

    trainer._observer = Watcher()
    with pytest.raises(ChannelUnavailable):
        trainer.fit(loader)

    assert newest_complete(tmp_path).name == f"step-{trainer.progress.step}"
    assert len(covered_ordinals(tmp_path)) == 4 * trainer.progress.step
    assert trainer.progress.step == 3, "what was fetched is trained"


def test_no_reference_is_lost_where_one_that_was_trained_before_cannot_be_given_up_for_long(
    attempt, ranks, tmp_path, monkeypatch
):
    monkeypatch.setattr(patience_module, "CHANNEL_AWAY_S", 0.2)
    attempt.publish(range(8))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    loader._trained.add(1)
    quarantine, tried = attempt.reader.quarantine, []

    def away_for_long(refs):
        tried.append(refs)
        if len(tried) < 4:
            raise ChannelUnavailable("no space")
        quarantine(refs)

    monkeypatch.setattr(attempt.reader, "quarantine", away_for_long)
    outcome = trainer.fit(loader)

    assert (outcome.reason, outcome.samples, outcome.unused) == ("end of stream", 7, 0)
    assert len(tried) == 4
    assert (attempt.store.key_count(), attempt.writer.in_flight_remote()) == (0, 0)


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), OSError(5, "Input/output error"), KeyError("a bug"), StoreUnavailable("gone")]
)
def test_any_ending_of_a_fit_saves_what_was_trained(attempt, ranks, tmp_path, error):
    attempt.publish(range(12))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    run = trainer.trainees[0].step.run

    def breaks(window, step, **counts):
        if step == 2:
            raise error
        return run(window, step, **counts)

    trainer.trainees[0].step.run = breaks
    with pytest.raises(type(error)):
        trainer.fit(loader)

    assert newest_complete(tmp_path).name == "step-2"
    assert len(covered_ordinals(tmp_path)) == 8


def test_a_disk_that_takes_long_for_the_cursor_holds_up_no_step(attempt, ranks, monkeypatch):
    """And nothing is removed before it is acknowledged, which all is before the producer is told of the end."""
    attempt.publish(range(20))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks)
    answers, left = threading.Event(), []
    ack = attempt.reader.ack
    monkeypatch.setattr(attempt.reader, "ack", lambda refs, *, step: (answers.wait(60), ack(refs, step=step)))

    class Watcher(StepObserver):
        def on_step(self, record):
            if record["step"] == 5:
                left.append((attempt.store.key_count(), attempt.writer.in_flight_remote(), record["in_flight"]))
                answers.set()

    trainer._observer = Watcher()
    outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.unused) == (5, 0)
    assert left == [(20, 20, 0)]
    assert (attempt.store.key_count(), attempt.writer.in_flight_remote()) == (0, 0)


def test_a_stream_has_not_ended_well_where_a_window_is_not_acknowledged_while_its_end_is_read(
    attempt, ranks, tmp_path, monkeypatch
):
    refs = attempt.publish(range(8), ended=False)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    reading, poll = threading.Event(), attempt.reader.poll

    def taken_over(_refs, *, step):
        assert reading.wait(60)
        raise ChannelBusy(f"another process reads the channel; step {step}")

    def read_the_end(wanted):
        if trainer.progress.step == 1:
            reading.set()
            eventually(lambda: all(settled.done() for settled in loader._settling._begun))
        return poll(wanted)

    class Watcher(StepObserver):
        def on_step(self, record):
            if record["step"] == 1:
                more = attempt.stored(range(8, 10))
                attempt.writer.publish_many(more)
                end(attempt.writer, refs + more)

    trainer._observer = Watcher()
    monkeypatch.setattr(attempt.reader, "ack", taken_over)
    monkeypatch.setattr(attempt.reader, "poll", read_the_end)
    with pytest.raises(ChannelBusy, match="step 1"):
        trainer.fit(loader)

    assert newest_complete(tmp_path).name == f"step-{trainer.progress.step}"


def test_what_was_fetched_is_trained_while_the_channel_is_away_and_then_the_rest(endpoints, tmp_path, run_id, ranks):
    """Its server answers nothing until all windows but the last are trained that were published before."""
    reached, seen = threading.Event(), []
    with leaving_redis(tmp_path) as server, Attempt(endpoints, tmp_path, run_id, url=server.url) as attempt:
        refs = attempt.publish(range(16), ended=False)
        trainer, loader = consumer(attempt.reader, attempt.store, ranks)

        class Watcher(StepObserver):
            def on_step(self, record):
                seen.append(record["in_flight"])
                if record["step"] == 1:
                    server.leave("silent")
                    returning.start()
                elif record["step"] == 3:
                    reached.set()

        def come_back() -> None:
            seen.append("in time" if reached.wait(30) else "too late")
            server.come_back()
            more = attempt.stored(range(16, 20))
            attempt.writer.publish_many(more)
            end(attempt.writer, refs + more)

        returning = threading.Thread(target=come_back)
        trainer._observer = Watcher()
        outcome = trainer.fit(loader)
        returning.join(60)

        assert (outcome.reason, outcome.steps, outcome.samples, outcome.unused) == ("end of stream", 5, 20, 0)
        assert (attempt.store.key_count(), attempt.writer.in_flight_remote()) == (0, 0)
    assert "in time" in seen
    assert [figure for figure in seen if figure != "in time"][:3] == [12, 12, 12], "the figure from before it was away"


def test_a_stop_is_heard_while_a_disk_takes_long_for_the_last_window(attempt, ranks, tmp_path, monkeypatch):
    """And the watchdog, as the other ranks, hears of this one meanwhile."""
    attempt.publish(range(4), ended=False)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    answers, answered = threading.Event(), []
    ack, abandon = attempt.reader.ack, loader.abandon
    monkeypatch.setattr(
        attempt.reader, "ack", lambda refs, *, step: (answered.append(answers.wait(30)), ack(refs, step=step))
    )
    monkeypatch.setattr(loader, "abandon", lambda *why: (answers.set(), abandon(*why)))

    class Watcher(StepObserver):
        def on_wait(self):
            if trainer.progress.step:
                loader.request_stop()

    trainer._observer = Watcher()
    with pytest.raises(Preempted):
        trainer.fit(loader)

    assert answered == [True]
    assert newest_complete(tmp_path).name == "step-1"
    assert (attempt.store.key_count(), attempt.writer.in_flight_remote()) == (0, 0)


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_an_error_left_half_changed_are_not_saved(attempt, ranks, tmp_path, late):
    attempt.publish(range(12))
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)
    trainer._reads_late = late
    trainer.trainees[0].step.optimizer.step = once(
        RuntimeError("in the middle"), trainer.trainees[0].step.optimizer.step
    )

    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(loader)

    assert newest_complete(tmp_path).name == "step-0"


def test_a_window_that_is_not_finite_is_skipped_counted_and_the_run_goes_on(attempt, ranks, tmp_path):
    """One sample of finite, huge states among 16: the loss of its window overflows, that of the others does not."""
    huge = sample(5)
    huge["last_hidden_state"][2] = 3e38
    refs = store_samples(attempt.store, attempt.identity, range(5))
    size = len(huge["input_ids"])
    name = sample_id_of(5)
    refs.append(attempt.store.put(name, huge, identity=attempt.identity, source_task_id=name, num_tokens=size))
    refs += store_samples(attempt.store, attempt.identity, range(6, 16))
    attempt.writer.publish_many(refs)
    end(attempt.writer, refs)
    trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path)

    outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.samples, outcome.quarantined, outcome.skipped) == (3, 12, 4, 1)
    assert all(torch.isfinite(weight).all() for weight in trainer.trainees[0].weights().values())
    assert {name for name, _ in outcome.given_up} == {sample_id_of(n) for n in range(4, 8)}
    assert attempt.writer.in_flight_remote() == 0
    assert attempt.store.key_count() == 0
