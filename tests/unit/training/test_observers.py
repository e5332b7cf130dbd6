"""What people see while training runs: metric lines, what was given up, and one progress file."""

import pytest

from disagg_core.run.metrics import read_metrics
from disagg_core.run.progress import ProgressFile, read_progress
from disagg_core.training.observers import (
    GivenUpObserver,
    MetricsObserver,
    Observers,
    ProgressObserver,
)
from disagg_core.training.phase_clock import Lap
from disagg_core.training.progress import TrainingProgress
from disagg_core.training.window import GivenUp
from flows.cli.run_view import _training_detail

pytestmark = pytest.mark.unit

RECORD = {
    "draft": "",
    "step": 3,
    "trained": 24,
    "quarantined": 0,
    "loss": 2.5,
    "accuracies": [0.5, 0.25],
    "learning_rate": 1e-3,
    "samples_per_s": 100.0,
    "tokens_per_s": 1000.0,
    "data_wait_s": 0.01,
    "in_flight": 8,
    "simulated_accept_length": 1.6,
    "sample_age_s": None,
}


def test_every_step_is_a_metric_line_and_the_progress_file_holds_the_last(tmp_path):
    progress = ProgressFile(tmp_path / "consumer.json", interval_s=0.0)
    both = Observers(MetricsObserver(tmp_path / "train.jsonl"), ProgressObserver(progress, 10))

    both.on_phase("training", TrainingProgress())
    both.on_step(RECORD)
    both.on_step(RECORD | {"step": 4})

    assert [record["step"] for record in read_metrics(tmp_path / "train.jsonl")] == [3, 4]
    state = read_progress(tmp_path / "consumer.json")
    assert (state["phase"], state["step"], state["total_steps"], state["loss"]) == ("training", 4, 10, 2.5)
    both.on_wait()
    assert read_progress(tmp_path / "consumer.json")["phase"] == "waiting for samples"
    both.on_phase("finished", TrainingProgress(step=4, samples=32))
    state = read_progress(tmp_path / "consumer.json")
    assert (state["phase"], state["trained"]) == ("finished", 32)


def test_what_was_measured_on_held_out_samples_has_a_file_of_its_own_and_is_seen_in_the_progress(tmp_path):
    progress = ProgressFile(tmp_path / "consumer.json", interval_s=0.0)
    metrics = [
        MetricsObserver(tmp_path / f"train-{name}.jsonl", name, tmp_path / f"heldout-{name}.jsonl")
        for name in ("a", "b")
    ]
    all_of_them = Observers(ProgressObserver(progress, 10), *metrics)
    measured = {"draft": "a", "step": 4, "loss": 1.25, "simulated_accept_length": 2.5, "best_step": 2, "since_best": 1}

    all_of_them.on_step(RECORD | {"draft": "a"})
    all_of_them.on_heldout(measured)

    assert [record["step"] for record in read_metrics(tmp_path / "train-a.jsonl")] == [3]
    (record,) = read_metrics(tmp_path / "heldout-a.jsonl")
    assert all(record[name] == value for name, value in measured.items() if name != "draft")
    assert "draft" not in record
    assert not (tmp_path / "heldout-b.jsonl").exists()
    state = read_progress(tmp_path / "consumer.json")
    assert (state["heldout_loss a"], state["heldout_accept_length a"], state["best_step a"]) == (1.25, 2.5, 2)
    assert "held-out loss a 1.250" in _training_detail("", {}, state)


def test_each_of_several_drafts_has_its_own_metrics_and_its_loss_in_the_progress(tmp_path):
    progress = ProgressFile(tmp_path / "consumer.json", interval_s=0.0)
    files = {name: tmp_path / name / "train.jsonl" for name in ("eagle3", "dflash")}
    all_of_them = Observers(
        ProgressObserver(progress, 10), *(MetricsObserver(path, name) for name, path in files.items())
    )

    all_of_them.on_step(RECORD | {"draft": "eagle3"})
    all_of_them.on_step(RECORD | {"draft": "dflash", "loss": 4.5})

    assert [record["loss"] for record in read_metrics(files["eagle3"])] == [2.5]
    (record,) = read_metrics(files["dflash"])
    assert record["loss"] == 4.5
    assert "draft" not in record
    state = read_progress(tmp_path / "consumer.json")
    assert (state["loss eagle3"], state["loss dflash"], state["step"]) == (2.5, 4.5, 3)
    shown = _training_detail("Running", {}, state)
    assert "loss eagle3 2.500, loss dflash 4.500" in shown


def test_samples_that_are_not_trained_on_are_kept_with_their_reasons(tmp_path):
    all_of_them = Observers(MetricsObserver(tmp_path / "train.jsonl"), GivenUpObserver(tmp_path / "quarantined.jsonl"))

    all_of_them.on_step(RECORD)
    all_of_them.on_given_up([GivenUp("s000000007", "hidden is not finite", lost=False)])
    all_of_them.on_given_up([GivenUp("s000000009", "no longer in the store", lost=True)])

    found = [(r["ordinal"], r["kind"], r["reason"]) for r in read_metrics(tmp_path / "quarantined.jsonl")]
    assert found == [(7, "quarantined", "hidden is not finite"), (9, "lost", "no longer in the store")]
    assert len(list(read_metrics(tmp_path / "train.jsonl"))) == 1


@pytest.mark.parametrize(("step_s", "left_after"), [(2.0, 5), (4.0, 5), (60.0, 2)])
def test_the_time_left_is_said_as_soon_as_a_few_steps_and_seconds_tell_it(tmp_path, step_s, left_after):
    progress = ProgressFile(tmp_path / "consumer.json", interval_s=0.0)
    observer = ProgressObserver(progress, total_steps=100)
    for step in range(1, 8):
        observer.on_lap(Lap(step=step, samples=4, seconds={"forward": step_s}))
        left_s = read_progress(tmp_path / "consumer.json")["left_s"]
        assert left_s == (None if step < left_after else (100 - step) * step_s), step


def test_progress_is_written_at_most_once_a_second(tmp_path):
    now = [0.0]
    file = ProgressFile(tmp_path / "consumer.json", clock=lambda: now[0])
    observer = ProgressObserver(file, None)

    observer.on_step(RECORD)
    observer.on_step(RECORD | {"step": 4})

    assert read_progress(tmp_path / "consumer.json")["step"] == 3
    now[0] = 1.0
    observer.on_step(RECORD | {"step": 5})
    assert read_progress(tmp_path / "consumer.json")["step"] == 5
