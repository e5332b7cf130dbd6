"""Measures drafts on held-out samples while they are trained, and tells when training gets them no further.

A measurement changes nothing: no weight, no gradient, and nothing of what is random in training. It is made at a step
boundary by all ranks together, each with its share of the samples, which stay in memory from the first one on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from disagg_core.drafts.figures import Figures
from disagg_core.drafts.method import Sample
from disagg_core.errors import DamagedHeldOut
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run_spec.results import EarlyStopSection, HeldOutSection
from disagg_core.training.checkpoint import BestMeasured
from disagg_core.training.distributed import Ranks
from disagg_core.training.inputs import DraftBatches, DraftInput
from disagg_core.training.trainee import Trainee

_log = logging.getLogger(__name__)
_SEED = 0
"""Of torch's generators during a measurement: whatever a loss draws from them is the same every time."""


@dataclass(frozen=True)
class HeldOutPlan:
    """What is measured on which samples, and when training stops for it."""

    files: HeldOutFiles
    section: HeldOutSection
    early_stop: EarlyStopSection | None


class HeldOut:
    """Measures the `trainees`, which read samples as `inputs` say. The same calls are made on every rank."""

    def __init__(
        self,
        plan: HeldOutPlan,
        trainees: Sequence[Trainee],
        inputs: Sequence[DraftInput],
        *,
        ranks: Ranks,
        batch_size: int,
    ) -> None:
        self._plan = plan
        self._trainees = trainees
        self._inputs = inputs
        self._ranks = ranks
        self._batch_size = batch_size
        self._windows: list[DraftBatches] | None = None
        self.measured_at: int | None = None
        """The step of the last measurement of this process."""

    def due(self, step: int) -> bool:
        """Whether it is time to measure after the trainer's `step`."""
        return step % self._plan.section.every_steps == 0 and step != self.measured_at

    def measure(self, step: int) -> list[Figures]:
        """Measure each draft after the trainer's `step`; return the figures. Each draft's progress keeps its best.

        Raises:
            DamagedHeldOut: the samples cannot be read.
        """
        if self._windows is None:
            self._windows = self._read()
        self.measured_at = step
        devices = [self._ranks.device] if self._ranks.device.type == "cuda" else []
        found = []
        for trainee, window in zip(self._trainees, self._windows, strict=True):
            with torch.random.fork_rng(devices):
                torch.manual_seed(_SEED)
                figures = trainee.step.measure(window)
            trainee.progress.best = self._best_of(trainee, figures, step)
            found.append(figures)
        return found

    @property
    def improved(self) -> bool:
        """Whether the last measurement was the best of one of the drafts so far."""
        bests = [trainee.progress.best for trainee in self._trainees]
        return any(best is not None and best.step == self.measured_at for best in bests)

    @property
    def exhausted(self) -> bool:
        """Whether no draft was better than its best in as many measurements in a row as early stopping allows."""
        stop = self._plan.early_stop
        if stop is None:
            return False
        bests = [trainee.progress.best for trainee in self._trainees]
        return all(best is not None and best.since >= stop.patience for best in bests)

    def _best_of(self, trainee: Trainee, figures: Figures, step: int) -> BestMeasured | None:
        name = self._plan.section.figure
        value, best = figures[name], trainee.progress.best
        assert isinstance(value, float)
        if not math.isfinite(value):
            _log.error("%sstep %d: %s of the held-out samples is %s", trainee.speaking, step, name, value)
        elif best is None or best.figure != name or _better(name, value, best.value):
            return BestMeasured(step=step, figure=name, value=value)
        if best is None:
            return None
        return BestMeasured(step=best.step, figure=best.figure, value=best.value, since=best.since + 1)

    def _read(self) -> list[DraftBatches]:
        """Return this rank's micro-batches of the samples for each draft; all ranks have the same number of them."""
        files, ranks = self._plan.files, self._ranks
        count = files.count
        if not count:
            raise DamagedHeldOut(
                "the held-out samples of training.heldout: expected the producer to have captured them before its "
                "first sample, found none; see its log"
            )
        own = [Sample(*files.read(number)) for number in range(ranks.data_rank, count, ranks.data_size)]
        rounds = math.ceil(math.ceil(count / ranks.data_size) / self._batch_size)
        windows = [reads.begin() for reads in self._inputs]
        for first in range(0, rounds * self._batch_size, self._batch_size):
            for reads, window in zip(self._inputs, windows, strict=True):
                reads.add(window, own[first : first + self._batch_size])
        return windows


def _better(figure: str, value: float, best: float) -> bool:
    return value < best if figure == "loss" else value > best
