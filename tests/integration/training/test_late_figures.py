"""Figures that are read a window late, as on a GPU: the same weights, counts and order as read at once."""

from __future__ import annotations

import pytest
import torch

from disagg_core.contracts import sample_id_of
from disagg_core.training.checkpoint import covered_ordinals, newest_complete
from disagg_core.training.distributed import Ranks
from disagg_core.training.trainer import StepObserver
from tests.integration.training.consumer_kit import Attempt, consumer, end, sample, section, store_samples

pytestmark = pytest.mark.integration


@pytest.fixture
def ranks():
    with Ranks.join("cpu") as joined:
        yield joined


class Steps(StepObserver):
    """What the trainer tells of each step."""

    def __init__(self):
        self.records = []

    def on_step(self, record):
        timed = ("data_wait_s", "step_s", "samples_per_s", "tokens_per_s", "sample_age_s", "in_flight")
        self.records.append({name: value for name, value in record.items() if name not in timed})


def spoil(trainer, window):
    """Have the loss of a window overflow, the first being 0."""
    step = trainer.trainees[0].step
    run, module, seen = step.run, step._module, []

    def spoilt(batch, normalisers):
        output = module(batch, normalisers)
        if len(seen) - 1 == window:
            output.total.mul_(float("inf"))
        return output

    step._module = spoilt
    step.run = lambda window, number, **counts: (seen.append(window), run(window, number, **counts))[1]


class Fit:
    """One fit over 24 samples, windows of 4, read late or at once."""

    def __init__(self, endpoints, root, run_id, ranks, number, *, late, spoilt=None, **training):
        self.root, self.steps = root / str(number), Steps()
        with Attempt(endpoints, root, run_id, number) as attempt:
            attempt.publish(range(24))
            trainer, loader = consumer(
                attempt.reader,
                attempt.store,
                ranks,
                checkpoints=self.root,
                training=section(**training),
                observer=self.steps,
                keep=9,
            )
            trainer._reads_late = late
            self.applied = []
            complete = loader.complete
            loader.complete = lambda window, **more: (
                self.applied.append(trainer.trainees[0].step.applied),
                complete(window, **more),
            )[1]
            if spoilt is not None:
                spoil(trainer, spoilt)
            self.outcome = trainer.fit(loader)
            self.left = (attempt.store.key_count(), attempt.writer.in_flight_remote())
            self.weights = trainer.trainees[0].weights()


@pytest.mark.parametrize(
    ("spoilt", "training"),
    [(None, {}), (None, {"save_every_steps": 2}), (2, {}), (None, {"max_steps": 4}), (0, {"save_every_steps": 2})],
)
def test_what_is_read_late_is_what_is_read_at_once(endpoints, tmp_path, run_id, ranks, spoilt, training):
    fits = [
        Fit(endpoints, tmp_path, run_id, ranks, number, late=late, spoilt=spoilt, **training)
        for number, late in ((1, False), (2, True))
    ]

    at_once, late = fits

    assert late.steps.records == at_once.steps.records
    assert all(torch.equal(weight, at_once.weights[name]) for name, weight in late.weights.items())
    for name in ("reason", "steps", "samples", "tokens", "quarantined", "skipped", "unused", "given_up"):
        assert getattr(late.outcome, name) == getattr(at_once.outcome, name), name
    assert late.left == at_once.left
    saved = sorted(path.name for path in at_once.root.iterdir())
    assert sorted(path.name for path in late.root.iterdir()) == saved
    for name in saved:
        assert covered_ordinals(late.root / name) == covered_ordinals(at_once.root / name)
    assert late.applied != at_once.applied  # a window was completed while the next one was computed


def test_any_ending_counts_and_saves_a_window_whose_figures_were_not_read(endpoints, tmp_path, run_id, ranks):
    with Attempt(endpoints, tmp_path, run_id) as attempt:
        attempt.publish(range(24))
        trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path / "saved")
        trainer._reads_late = True
        run = trainer.trainees[0].step.run

        def breaks(window, number, **counts):
            if trainer.trainees[0].step.applied == 3:
                raise MemoryError("no memory")
            return run(window, number, **counts)

        trainer.trainees[0].step.run = breaks
        with pytest.raises(MemoryError):
            trainer.fit(loader)

        assert attempt.writer.in_flight_remote() == 12

    assert newest_complete(tmp_path / "saved").name == "step-3"
    assert len(covered_ordinals(tmp_path / "saved")) == 12


def test_a_window_is_complete_before_the_next_one_is_waited_for(endpoints, tmp_path, run_id, ranks):
    """The producer may have no room for another sample until then."""
    with Attempt(endpoints, tmp_path, run_id) as attempt:
        refs = attempt.publish(range(4), ended=False)
        trainer, loader = consumer(attempt.reader, attempt.store, ranks)
        trainer._reads_late = True
        seen = []

        def waits():
            seen.append(attempt.writer.in_flight_remote())
            if len(seen) == 1:
                more = store_samples(attempt.store, attempt.identity, range(4, 6))
                attempt.writer.publish_many(more)
                end(attempt.writer, refs + more)

        observer = Steps()
        observer.on_wait = waits
        trainer._observer = observer
        outcome = trainer.fit(loader)

    assert outcome.samples == 6
    assert seen[0] == 0


def test_a_sample_that_overflows_is_left_out_of_the_weights(endpoints, tmp_path, run_id, ranks):
    huge = sample(5)
    huge["last_hidden_state"][2] = 3e38
    with Attempt(endpoints, tmp_path, run_id) as attempt:
        refs = store_samples(attempt.store, attempt.identity, range(5))
        name = sample_id_of(5)
        refs.append(
            attempt.store.put(
                name, huge, identity=attempt.identity, source_task_id=name, num_tokens=len(huge["input_ids"])
            )
        )
        refs += store_samples(attempt.store, attempt.identity, range(6, 16))
        attempt.writer.publish_many(refs)
        end(attempt.writer, refs)
        trainer, loader = consumer(attempt.reader, attempt.store, ranks)
        trainer._reads_late = True

        outcome = trainer.fit(loader)

    assert (outcome.steps, outcome.samples, outcome.quarantined, outcome.skipped) == (3, 12, 4, 1)
    assert all(torch.isfinite(weight).all() for weight in trainer.trainees[0].weights().values())
    assert {name for name, _ in outcome.given_up} == {sample_id_of(n) for n in range(4, 8)}
