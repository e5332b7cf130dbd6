"""What the trainer writes while it runs: metrics/{train,heldout}.jsonl, what it gave up, and its progress file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disagg_core.contracts import ordinal_of
from disagg_core.run.metrics import JsonlMetrics
from disagg_core.run.phases import DATA_WAIT, RecentShares, fields_of
from disagg_core.run.progress import ProgressFile, figure_of
from disagg_core.training.phase_clock import Lap
from disagg_core.training.progress import TrainingProgress
from disagg_core.training.trainer import StepObserver
from disagg_core.training.window import GivenUp

DRAFT = "draft"
"""The field of a step's record that says which draft took it; empty for the only one."""


class MetricsObserver(StepObserver):
    """Writes each step of one draft as one line of a metrics file, and each measurement as one line of another."""

    def __init__(self, path: Path, draft: str = "", heldout: Path | None = None) -> None:
        self._metrics, self._draft = JsonlMetrics(path), draft
        self._heldout_path = heldout
        self._heldout: JsonlMetrics | None = None

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Append the step, if it is the draft's."""
        if record[DRAFT] == self._draft:
            self._metrics.write(**_without_draft(record))

    def on_heldout(self, record: Mapping[str, Any]) -> None:
        """Append the measurement, if it is the draft's and there is a file for it."""
        if record[DRAFT] == self._draft and self._heldout_path is not None:
            self._heldout = self._heldout or JsonlMetrics(self._heldout_path)
            self._heldout.write(**_without_draft(record))


class LapObserver(StepObserver):
    """Writes where the time of each window went as one line of a metrics file."""

    def __init__(self, path: Path) -> None:
        self._metrics = JsonlMetrics(path)

    def on_lap(self, lap: Lap) -> None:
        """Append the window."""
        self._metrics.write(step=lap.step, samples=lap.samples, **fields_of(lap.seconds))


def _without_draft(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != DRAFT}


class GivenUpObserver(StepObserver):
    """Keeps the attempt's ``quarantined.jsonl``: every sample that was not trained on, and why.

    `kind` is ``quarantined`` for one that is given up for good, and ``lost`` for one that is captured again.
    """

    def __init__(self, path: Path) -> None:
        self._file = JsonlMetrics(path)

    def on_given_up(self, given_up: Sequence[GivenUp]) -> None:
        """Append a line for each."""
        for item in given_up:
            kind = "lost" if item.lost else "quarantined"
            ordinal = ordinal_of(item.sample_id)
            self._file.write(ordinal=ordinal, sample_id=item.sample_id, kind=kind, reason=item.reason)


class ProgressObserver(StepObserver):
    """Keeps the role's progress file fresh, also while training waits for samples."""

    def __init__(self, file: ProgressFile, total_steps: int | None) -> None:
        self._file = file
        self._total_steps = total_steps
        self._recent = RecentShares()

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Take the step's figures into the file."""
        names = ("step", "trained", "quarantined", "samples_per_s", "tokens_per_s", "data_wait_s", "in_flight")
        own = ("loss", "learning_rate", "simulated_accept_length")
        fields = {name: record[name] for name in names}
        fields |= {figure_of(record[DRAFT], name): record[name] for name in own}
        self._file.update(phase="training", total_steps=self._total_steps, **fields)

    def on_lap(self, lap: Lap) -> None:
        """Show where the time of the last minutes went, what training could do without waits, and how long it takes."""
        self._recent.add(lap.seconds, samples=lap.samples)
        steps_left = None if self._total_steps is None else max(0, self._total_steps - lap.step)
        mean_s = self._recent.mean_s
        self._file.update(
            **self._recent.fields(),
            train_capacity=self._recent.rate_without(DATA_WAIT),
            left_s=None if steps_left is None or mean_s is None else round(steps_left * mean_s),
        )

    def on_heldout(self, record: Mapping[str, Any]) -> None:
        """Take what was measured, and which step was the best, into the file."""
        names = {"heldout_loss": "loss", "heldout_accept_length": "simulated_accept_length", "best_step": "best_step"}
        self._file.update(**{figure_of(record[DRAFT], name): record[own] for name, own in names.items()})

    def on_phase(self, phase: str, progress: TrainingProgress) -> None:
        """Write the phase at once."""
        self._file.update(
            phase=phase,
            step=progress.step,
            total_steps=self._total_steps,
            trained=progress.samples,
            **{figure_of(draft, "loss"): own.loss_last for draft, own in progress.drafts.items()},
        )
        self._file.flush()

    def on_wait(self) -> None:
        """Show that the trainer is alive."""
        self._file.update(phase="waiting for samples")


class Observers(StepObserver):
    """Several observers as one."""

    def __init__(self, *observers: StepObserver) -> None:
        self._observers = observers

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_step(record)

    def on_heldout(self, record: Mapping[str, Any]) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_heldout(record)

    def on_phase(self, phase: str, progress: TrainingProgress) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_phase(phase, progress)

    def on_lap(self, lap: Lap) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_lap(lap)

    def on_given_up(self, given_up: Sequence[GivenUp]) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_given_up(given_up)

    def on_wait(self) -> None:
        """Pass it on to every observer."""
        for observer in self._observers:
            observer.on_wait()
