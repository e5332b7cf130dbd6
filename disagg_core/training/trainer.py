"""The training loop: one optimizer step per window, then acknowledge, free, record, and now and then checkpoint.

The order after a step is fixed: the weights of every draft hold the window, then it is acknowledged, then its samples
are removed; no step waits for the last two (`settling`). A checkpoint holds all weights and the data cursor of one step
boundary, so whatever ends the process, the next attempt continues from weights that know exactly what they have seen.

On a GPU a window's figures are read while the next one is computed, and what follows from them is done then: the
device never waits for the host. Where the next window is not there yet, before a checkpoint, and at the end it is done
at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from disagg_core.contracts import ordinal_of
from disagg_core.errors import (
    ChannelError,
    DraftlineError,
    PeerFailed,
    Preempted,
    TrainingDiverged,
    classify,
)
from disagg_core.run.outcomes import EARLY_STOP, MAX_STEPS
from disagg_core.training.checkpointing import Checkpointing
from disagg_core.training.distributed import Ranks
from disagg_core.training.heldout import HeldOut
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.phase_clock import Lap, PhaseClock
from disagg_core.training.progress import CheckpointPolicy, FitTally, TrainingProgress, TrainOutcome
from disagg_core.training.step import StepResult
from disagg_core.training.trainee import OpenWindow, Trainee
from disagg_core.training.window import GivenUp, TrainingWindow, skipped_all

_log = logging.getLogger(__name__)

_GOOD_ENDS = ("end of stream", MAX_STEPS, EARLY_STOP)
_LAST_WINDOWS = 2
"""A stream whose last windows, so many, were not finite has most likely left weights that are spoiled."""


class StepObserver:
    """Is told, on rank 0, what the trainer does: metric files, trackers, progress. By default it heeds nothing."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Take one draft's figures of a step, as they stand in ``metrics/train.jsonl``; `draft` is its folder."""

    def on_phase(self, phase: str, progress: TrainingProgress) -> None:
        """Record that the trainer entered `phase`."""

    def on_lap(self, lap: Lap) -> None:
        """Record where the time of a window went; on a GPU that is known some steps later."""

    def on_given_up(self, given_up: Sequence[GivenUp]) -> None:
        """Take samples of a window that weigh zero, before the window is acknowledged."""

    def on_wait(self) -> None:
        """Record that the trainer waits for references."""

    def on_heldout(self, record: Mapping[str, Any]) -> None:
        """Take one draft's figures of the held-out samples, as they stand in ``metrics/heldout.jsonl``."""


class Trainer:
    """Trains drafts from a stream: every window is a step of each of them. The same calls are made on every rank."""

    def __init__(
        self,
        trainees: Sequence[Trainee],
        *,
        ranks: Ranks,
        checkpoints: CheckpointPolicy | None = None,
        max_steps: int | None = None,
        max_diverged_windows: int = 5,
        heldout: HeldOut | None = None,
        observer: StepObserver | None = None,
        on_progress: Callable[[str], None] = lambda what: None,
        clock: PhaseClock | None = None,
        reads_late: bool | None = None,
    ) -> None:
        """`on_progress` is told, on every rank, of all that counts as getting on: steps, fetches, saves, waits.

        `reads_late`: figures are read a window later; by default on a GPU.
        """
        self.trainees = trainees
        self._ranks = ranks
        self._max_steps = max_steps
        self._max_diverged_windows = max_diverged_windows
        self._heldout = heldout
        self._on_progress = on_progress
        self._clock = clock or PhaseClock()
        self._reads_late = ranks.device.type != "cpu" if reads_late is None else reads_late
        self._open: OpenWindow | None = None
        self._counted: list[int] = self._applied()
        self._observer = observer if ranks.is_first else None
        self.progress = TrainingProgress(drafts={trainee.folder: trainee.progress for trainee in trainees})
        self._checkpoints = Checkpointing(
            checkpoints, trainees, self.progress, ranks=ranks, on_saving=lambda: self._phase("saving")
        )

    def _applied(self) -> list[int]:
        return [trainee.step.applied for trainee in self.trainees]

    # --- checkpoints --------------------------------------------------------------------------------------------

    def restore_newest(self) -> Path | None:
        """Go on from the newest whole checkpoint, if there is one, on every rank; return where it lies.

        Raises:
            CheckpointError: it belongs to another run, target or vocabulary map, or has other drafts.
        """
        return self._checkpoints.restore_newest()

    def save(self) -> None:
        """Have a whole checkpoint of this step boundary; every rank must call it, none returns before.

        Raises:
            CheckpointNotSaved: it could not be written.
        """
        assert self._open is None, "the weights hold a window that is not counted"
        self._clock.enter("save")
        self._checkpoints.start()
        self._checkpoints.finish()
        self._clock.enter("other")
        self._on_progress("saved a checkpoint")

    def _save_after(self, error: Exception, loader: FeatureDataLoader, tally: FitTally) -> None:
        """Save what was trained until `error`, if the weights are sound and no other rank has to help.

        Other ranks may be anywhere at this moment. What all of them notice ends in `_train`, and is saved by all.
        Weights that only give numbers that are not finite are not sound; the newest checkpoint is from before them.
        """
        counted = self._open.applied if self._open is not None else self._counted
        diverged = isinstance(error, TrainingDiverged)
        sound = self._applied() == counted and not self._checkpoints.failed and not diverged
        if not sound or self._ranks.size > 1:
            return
        try:
            self._close(loader, tally)
            if self.progress.step:
                self.save()
        except (DraftlineError, RuntimeError, OSError) as further:
            error.add_note(f"what was trained until then could not be saved: {further}")

    # --- the loop -----------------------------------------------------------------------------------------------

    def fit(self, loader: FeatureDataLoader) -> TrainOutcome:
        """Train on every window of `loader`, save, and tell the producer how it ended.

        Raises:
            Preempted: a stop was requested; a checkpoint was saved first.
            TrainingDiverged: too many windows in a row were not finite; nothing is saved.
            DraftlineError: whatever else ended training; the channel was told. A checkpoint was saved unless the
                weights are not sound, or the ranks could not do it together.
        """
        tally = FitTally()
        loader.on_progress, loader.on_phase = self._on_progress, self._clock.enter
        try:
            reason = self._train(loader, tally)
            if reason in _GOOD_ENDS and tally.steps:
                self._measure_last()
            self.save()
            if reason not in _GOOD_ENDS:
                raise self._cause_of(reason, loader)
            unused = loader.finish(reason)
        except BaseException as error:
            if isinstance(error, Exception):
                self._save_after(error, loader, tally)
            try:
                loader.abandon("preempted" if isinstance(error, Preempted) else _describe(error), classify(error))
            except (ChannelError, Preempted) as further:
                _log.error("the producer could not be told: %s", further)
            raise
        finally:
            self._checkpoints.close()
        self._tell_laps()
        self._phase("finished")
        return self._outcome(reason, tally, unused)

    def _cause_of(self, reason: str, loader: FeatureDataLoader) -> BaseException:
        """Return what a fit that ended for `reason` raises, after its checkpoint."""
        if reason == "stop requested":
            return Preempted(f"asked to stop; saved at step {self.progress.step}, the next attempt continues there")
        return loader.failure or PeerFailed("the stream failed on another rank, which says why")

    def _train(self, loader: FeatureDataLoader, tally: FitTally) -> str:
        """Train until the stream, the steps or the process's time end; return which."""
        if self.progress.step == 0:
            self._checkpoints.start()
        loader.on_wait = self._on_wait
        loader.before_waiting = lambda: self._close(loader, tally)
        self._phase("waiting for samples")
        if (end := self._end_of_steps()) is not None:
            return end
        for window in loader:
            if tally.started:
                tally.wait_s += window.wait_s
            else:
                tally.started = time.monotonic()
                self._clock.restart()
                self._phase("training")
            stepped = self._train_window(loader, window, tally)
            self._checkpoints.look()
            if stepped:
                self._at_step_boundary()
            self._end_lap(window)
            if (end := self._end_of_steps()) is not None:
                return end
            self._check_skipped(self._max_diverged_windows)
        self._close(loader, tally)
        assert loader.end_reason is not None
        if loader.end_reason == "end of stream":
            self._check_skipped(min(_LAST_WINDOWS, self._max_diverged_windows))
        return loader.end_reason

    def _check_skipped(self, allowed: int) -> None:
        """Raise `TrainingDiverged` if as many windows as `allowed` in a row were not finite for one of the drafts."""
        for trainee in self.trainees:
            trainee.check_skipped(allowed)

    def _end_of_steps(self) -> str | None:
        """Return why no further step is to be taken, though there may be samples for one; None if one is."""
        if self._max_steps is not None and self.progress.step >= self._max_steps:
            return MAX_STEPS
        return EARLY_STOP if self._heldout is not None and self._heldout.exhausted else None

    def _at_step_boundary(self) -> None:
        """Measure and save, where it is time to."""
        if self._heldout is not None and self._heldout.due(self.progress.step):
            self._measure(self._heldout)
        if self._checkpoints.due:
            self._clock.enter("save")
            self._checkpoints.start()
            self._clock.enter("other")

    def _measure(self, heldout: HeldOut) -> None:
        """Measure the drafts on the held-out samples, and begin to save them where one is at its best."""
        self._phase("measuring")
        self._clock.enter("evaluate")
        found = heldout.measure(self.progress.step)
        if heldout.improved:
            self._clock.enter("save")
            self._checkpoints.start()
        self._clock.enter("other")
        if self._observer is not None:
            for trainee, figures in zip(self.trainees, found, strict=True):
                best = trainee.progress.best
                judged = {"best_step": best.step if best else None, "since_best": best.since if best else None}
                self._observer.on_heldout({"draft": trainee.folder, "step": self.progress.step, **figures, **judged})
        self._phase("training")

    def _measure_last(self) -> None:
        """Measure what the last step has left, unless that is done."""
        if self._heldout is not None and self._heldout.measured_at != self.progress.step:
            self._measure(self._heldout)

    def _train_window(self, loader: FeatureDataLoader, window: TrainingWindow, tally: FitTally) -> bool:
        """Train every draft on `window`; return whether it is complete and one of them took a step."""
        started = time.monotonic()
        trained = [
            trainee.train(batches, samples=window.samples, tokens=window.tokens)
            for trainee, batches in zip(self.trainees, window.drafts, strict=True)
        ]
        window.drafts.clear()  # the device's memory is needed for those that follow
        self._close(loader, tally)
        self._open = OpenWindow(window, trained, self._applied(), started)
        return False if self._may_read_late() else self._close(loader, tally)

    def _may_read_late(self) -> bool:
        """Whether the open window may wait for the next one: not before a checkpoint, a measurement, or the end.

        After one that was not finite it may not either, so that a run that diverges ends where it would have.
        """
        if not self._reads_late or any(trainee.progress.skipped_in_row for trainee in self.trainees):
            return False
        number = self.progress.step + 1
        if self._checkpoints.due_at(number) or (self._heldout is not None and self._heldout.due(number)):
            return False
        return self._max_steps is None or number < self._max_steps

    def _close(self, loader: FeatureDataLoader, tally: FitTally) -> bool:
        """Read the figures of the open window, if there is one, and complete it; return whether a draft took a step."""
        if self._open is None:
            return False
        opened, self._open = self._open, None
        window = opened.window
        results = [trained.result() for trained in opened.trained]
        stepped = [result for result in results if result is not None and result.finite]
        given_up = loader.given_up_in(window)
        if stepped:
            self.progress.step += 1
            tally.steps += 1
        elif skipped := [result for result in results if result is not None]:
            tally.skipped += 1
            given_up = skipped_all(window, given_up, skipped[0].fault())
        self._count(window, given_up, tally, tokens=stepped[0].tokens if stepped else 0)
        self._counted = opened.applied
        if given_up and self._observer is not None:
            self._observer.on_given_up(given_up)
        self._clock.enter("ack")
        loader.complete(window, step=self.progress.step, given_up=given_up)
        loader.note(f"trained step {self.progress.step}")
        self._clock.enter("other")
        self._on_progress("trained a window")
        self._tell(loader, window, results, time.monotonic() - opened.started)
        return bool(stepped)

    def _count(self, window: TrainingWindow, given_up: list[GivenUp], tally: FitTally, *, tokens: int) -> None:
        unusable = {item.sample_id: item for item in given_up}
        for ref in window.refs:
            item = unusable.get(ref.sample_id)
            if item is None:
                self.progress.trained.add(ordinal_of(ref.sample_id))
            elif not item.lost:
                self.progress.quarantined.add(ordinal_of(ref.sample_id))
        samples = len(window.refs) - len(unusable)
        self.progress.samples += samples
        self.progress.tokens += tokens
        tally.samples += samples
        tally.tokens += tokens
        tally.lost += sum(item.lost for item in given_up)
        tally.given_up += [(item.sample_id, item.reason) for item in given_up]

    # --- reporting ----------------------------------------------------------------------------------------------

    def _tell(
        self, loader: FeatureDataLoader, window: TrainingWindow, results: Sequence[StepResult | None], step_s: float
    ) -> None:
        """Tell the observer of each draft's step; `step_s` are the seconds that all of them took."""
        if self._observer is None:
            return
        seconds = max(step_s + window.wait_s, 1e-9)
        shared = {
            "data_wait_s": window.wait_s,
            "step_s": step_s,
            "in_flight": loader.in_flight,
            **{f"store_{name}": count for name, count in loader.store_trouble.items()},
            "sample_age_s": window.oldest_age_s(time.time()),
            "trained": self.progress.samples,
            "quarantined": len(self.progress.quarantined),
        }
        for trainee, result in zip(self.trainees, results, strict=True):
            if result is not None and result.finite:
                rates = {"samples_per_s": result.samples / seconds, "tokens_per_s": result.tokens / seconds}
                own = {"draft": trainee.folder, "step": trainee.progress.step, **result.record(), **rates}
                self._observer.on_step({**own, **shared})

    def _end_lap(self, window: TrainingWindow) -> None:
        """Tell the observer where the time went of the windows of which that is known."""
        self._clock.lap(self.progress.step + (self._open is not None), samples=len(window.refs))
        self._tell_laps()

    def _tell_laps(self) -> None:
        for lap in self._clock.finished():
            if self._observer is not None:
                self._observer.on_lap(lap)

    def _phase(self, phase: str) -> None:
        self._on_progress(phase)
        if self._observer is not None:
            self._observer.on_phase(phase, self.progress)

    def _on_wait(self) -> None:
        self._on_progress("waiting for samples")
        if self._observer is not None:
            self._observer.on_wait()

    def _outcome(self, reason: str, tally: FitTally, unused: int) -> TrainOutcome:
        seconds = tally.seconds
        return TrainOutcome(
            reason=reason,
            steps=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            quarantined=len(self.progress.quarantined),
            quarantined_ordinals=self.progress.quarantined.ranges(),
            lost=tally.lost,
            skipped=tally.skipped,
            unused=unused,
            steps_here=tally.steps,
            samples_here=tally.samples,
            tokens_here=tally.tokens,
            drafts=dict(self.progress.drafts),
            parameters={trainee.folder: trainee.parameters for trainee in self.trainees},
            seconds=seconds,
            data_wait_s=tally.wait_s,
            samples_per_second=tally.samples / seconds if seconds else 0.0,
            tokens_per_second=tally.tokens / seconds if seconds else 0.0,
            checkpoint=self._checkpoints.newest.name if self._checkpoints.newest else None,
            given_up=tally.given_up,
        )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
