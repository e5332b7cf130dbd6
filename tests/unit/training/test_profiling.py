"""A window of steps is profiled, and nothing else."""

import gzip
import json

import pytest
import torch

from disagg_core.run_spec.document import ProfileSection
from disagg_core.training.profiling import ProfileObserver
from disagg_core.training.progress import TrainingProgress

pytestmark = pytest.mark.unit


def train(observer, first, last):
    """Take the steps after `first` to `last`, each of them one product that the trace can be searched for."""
    observer.on_phase("training", TrainingProgress(step=first))
    for step in range(first + 1, last + 1):
        torch.ones(4, 4) @ torch.ones(4, 4)
        observer.on_step({"step": step})
    observer.on_phase("finished", TrainingProgress(step=last))


def products_in(path):
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("start", "steps", "first", "last", "name", "profiled"),
    [
        (0, 2, 0, 6, "steps-1-2", 2),
        (2, 3, 0, 6, "steps-3-5", 3),
        (2, 3, 3, 6, "steps-4-5", 2),
        (4, 9, 0, 6, "steps-5-6", 2),
    ],
    ids=["from the first step", "later", "resumed inside the window", "training ends before the window"],
)
def test_the_steps_of_the_window_are_in_the_trace(tmp_path, start, steps, first, last, name, profiled):
    train(ProfileObserver(ProfileSection(start=start, steps=steps), tmp_path / "profiles"), first, last)
    (trace,) = (tmp_path / "profiles").iterdir()
    assert trace.name == f"{name}.json.gz"
    assert products_in(trace) == profiled


def test_a_run_that_is_resumed_behind_the_window_has_no_trace(tmp_path):
    train(ProfileObserver(ProfileSection(start=1, steps=2), tmp_path / "profiles"), 3, 6)
    assert not (tmp_path / "profiles").exists()


def test_a_trace_that_cannot_be_written_costs_nothing_else(tmp_path, caplog):
    (tmp_path / "profiles").write_text("a file in the way")
    train(ProfileObserver(ProfileSection(start=0, steps=1), tmp_path / "profiles"), 0, 2)
    assert "the profile cannot be written" in caplog.text
