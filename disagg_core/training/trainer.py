"""The training loop: one optimizer step per window, then acknowledge, free, record, and now and then checkpoint.

The order after a step is fixed: the weights hold the window, then it is acknowledged, then its samples are removed.
A checkpoint holds weights and data cursor of one step boundary, so whatever ends the process, the next attempt
continues from weights that know exactly what they have seen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from disagg_core.contracts import ordinal_of
from disagg_core.drafts.method import DraftModel
from disagg_core.errors import ChannelError, Preempted, RoleFailed, classify
from disagg_core.ordinals import OrdinalSet
from disagg_core.training.checkpoint import (
    CheckpointContent,
    DataCursor,
    TrainerState,
    checkpoint_path,
    load_checkpoint,
    newest_complete,
    save_checkpoint,
)
from disagg_core.training.distributed import Ranks
from disagg_core.training.loader import FeatureDataLoader, GivenUp, TrainingWindow
from disagg_core.training.state import gather_optimizer, gather_weights, restore_optimizer, restore_weights
from disagg_core.training.step import OptimizerStep, StepResult

_log = logging.getLogger(__name__)


class StepObserver(Protocol):
    """Is told, on rank 0, what the trainer does: metric files, trackers, progress."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """Take one step's figures, as they stand in ``metrics/train.jsonl``."""

    def on_phase(self, phase: str, progress: TrainingProgress) -> None:
        """Record that the trainer entered `phase`."""

    def on_wait(self) -> None:
        """Record that the trainer waits for references."""


class TrainOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a fit ended. Counts with `_here` are of this fit, the others of the run since its first attempt.

    `lost` samples of this fit have to be captured again; `quarantined` ones are given up for good; `given_up` lists
    both, (sample id, reason) each. `unused` counts references that were published but not trained when the last step
    was reached. Rates are per second from the first window on, over all ranks.
    """

    reason: str
    steps: int
    samples: int
    tokens: int
    quarantined: int
    lost: int
    unused: int
    steps_here: int
    samples_here: int
    tokens_here: int
    loss_first: float | None
    loss_last: float | None
    seconds: float
    data_wait_s: float
    samples_per_second: float
    tokens_per_second: float
    checkpoint: str | None
    given_up: list[tuple[str, str]]


@dataclass
class TrainingProgress:
    """What was done since the run began: what a checkpoint remembers."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    trained: OrdinalSet = field(default_factory=OrdinalSet)
    quarantined: OrdinalSet = field(default_factory=OrdinalSet)
    loss_first: float | None = None
    loss_last: float | None = None

    def cursor(self) -> DataCursor:
        """Return the data cursor."""
        return DataCursor(trained=self.trained.ranges(), quarantined=self.quarantined.ranges())


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where checkpoints go, how often, how many stay, and whose they are."""

    root: Path
    every_steps: int
    keep: int
    seed: int
    identity: Mapping[str, str]
    total_steps: int | None


@dataclass
class _FitTally:
    """What one call of `fit` has done."""

    started: float = 0.0
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    lost: int = 0
    given_up: list[tuple[str, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started if self.started else 0.0


class Trainer:
    """Trains a draft from a stream. The same calls are made on every rank."""

    def __init__(
        self,
        step: OptimizerStep,
        draft: DraftModel,
        *,
        ranks: Ranks,
        checkpoints: CheckpointPolicy | None = None,
        max_steps: int | None = None,
        observer: StepObserver | None = None,
    ) -> None:
        self._step = step
        self._draft = draft
        self._ranks = ranks
        self._policy = checkpoints
        self._max_steps = max_steps
        self._observer = observer if ranks.is_first else None
        self._saved: Path | None = None
        self._saved_cursor: DataCursor | None = None
        self.progress = TrainingProgress()

    # --- checkpoints --------------------------------------------------------------------------------------------

    def restore_newest(self) -> Path | None:
        """Restore the newest whole checkpoint, if there is one, on every rank; return where it lies.

        Raises:
            CheckpointError: it belongs to another run, target or vocabulary map.
        """
        if self._policy is None:
            return None
        newest = newest_complete(self._policy.root) if self._ranks.is_first else None
        name = self._ranks.broadcast(str(newest or "").encode()).decode()
        if not name:
            return None
        self.restore(load_checkpoint(Path(name), identity=self._policy.identity, verify=False))
        self._saved = Path(name)
        _log.info("continuing from %s: %d samples trained", name, self.progress.samples)
        return self._saved

    def restore(self, content: CheckpointContent) -> None:
        """Take weights, optimizer, random state, counts and cursor from `content`.

        Raises:
            CheckpointError: its tensors are not this draft's.
        """
        restore_weights(self._draft, self._draft.serving_state_dict(), content.draft)
        restore_optimizer(self._draft, self._step.optimizer, content.optimizer)
        torch.set_rng_state(content.rng["cpu"])
        if self._ranks.device.type == "cuda":
            torch.cuda.set_rng_state(content.rng["cuda"], self._ranks.device)
        state = content.state
        self.progress.step, self.progress.samples, self.progress.tokens = state.step, state.samples, state.tokens
        self.progress.loss_first, self.progress.loss_last = state.loss_first, state.loss_last
        for ordinals, ranges in (
            (self.progress.trained, state.cursor.trained),
            (self.progress.quarantined, state.cursor.quarantined),
        ):
            for ordinal in OrdinalSet(ranges):
                ordinals.add(ordinal)
        self._saved_cursor = self.progress.cursor()

    def save(self) -> Path | None:
        """Write a checkpoint of this step boundary, if there is none; every rank must call it, none returns before.

        One of the same step with another cursor is replaced: a window without anything to train on is acknowledged
        all the same. None without a checkpoint policy.
        """
        policy = self._policy
        if policy is None:
            return None
        path, cursor = checkpoint_path(policy.root, self.progress.step), self.progress.cursor()
        if (self._saved, self._saved_cursor) == (path, cursor):
            return path
        self._phase("saving")
        draft = self.weights()
        optimizer = gather_optimizer(self._draft, self._step.optimizer)
        content = CheckpointContent(draft, self._draft.config.to_dict(), optimizer, self._rng(), self._state(policy))
        self._ranks.first_does(lambda: save_checkpoint(policy.root, content, keep=policy.keep))
        self._saved, self._saved_cursor = path, cursor
        return path

    def weights(self) -> dict[str, torch.Tensor]:
        """Return the draft in serving names, whole, fp32 and on the CPU, on rank 0; every rank must call it."""
        return gather_weights(self._draft, self._draft.serving_state_dict())

    def _rng(self) -> dict[str, torch.Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._ranks.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._ranks.device)
        return states

    def _state(self, policy: CheckpointPolicy) -> TrainerState:
        return TrainerState(
            step=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            seed=policy.seed,
            total_steps=policy.total_steps,
            identity=dict(policy.identity),
            cursor=self.progress.cursor(),
            loss_first=self.progress.loss_first,
            loss_last=self.progress.loss_last,
        )

    # --- the loop -----------------------------------------------------------------------------------------------

    def fit(self, loader: FeatureDataLoader) -> TrainOutcome:
        """Train on every window of `loader`, save, and tell the producer how it ended.

        Raises:
            Preempted: a stop was requested; a checkpoint was saved first.
            DraftlineError: whatever else ended training; the channel was told.
        """
        tally = _FitTally()
        try:
            reason = self._train(loader, tally)
            self.save()
            if reason == "stop requested":
                raise Preempted(f"asked to stop; saved at step {self.progress.step}, the next attempt continues there")
            if reason == "stream failed":
                raise loader.failure or RoleFailed("the stream failed; rank 0 knows why", "stalled")
            unused = loader.finish(reason)
        except BaseException as error:
            try:
                loader.abandon("preempted" if isinstance(error, Preempted) else _describe(error), classify(error))
            except ChannelError as further:
                _log.error("the producer could not be told: %s", further)
            raise
        self._phase("finished")
        return self._outcome(reason, tally, unused)

    def _train(self, loader: FeatureDataLoader, tally: _FitTally) -> str:
        """Train until the stream, the steps or the process's time end; return which."""
        if self.progress.step == 0:
            self.save()
        loader.on_wait = self._on_wait
        self._phase("waiting for samples")
        if self._reached_max_steps():
            return "max_steps"
        for window in loader:
            if not tally.started:
                tally.started = time.monotonic()
                self._phase("training")
            stepped = self._train_window(loader, window, tally)
            if stepped and self._policy is not None and self.progress.step % self._policy.every_steps == 0:
                self.save()
            if self._reached_max_steps():
                return "max_steps"
        assert loader.end_reason is not None
        return loader.end_reason

    def _reached_max_steps(self) -> bool:
        return self._max_steps is not None and self.progress.step >= self._max_steps

    def _train_window(self, loader: FeatureDataLoader, window: TrainingWindow, tally: _FitTally) -> bool:
        """Train on `window` and complete it; return whether there was anything in it to take a step on."""
        started = time.monotonic()
        result = self._step.run(window, self.progress.step)
        if result is not None:
            self.progress.step += 1
            tally.steps += 1
            self.progress.loss_last = result.loss
            if self.progress.loss_first is None:
                self.progress.loss_first = result.loss
        given_up = loader.complete(window, step=self.progress.step)
        self._count(window, given_up, tally, result)
        tally.wait_s += window.wait_s
        if result is not None and self._observer is not None:
            self._observer.on_step(self._record(loader, window, result, tally, time.monotonic() - started))
        return result is not None

    def _count(
        self, window: TrainingWindow, given_up: list[GivenUp], tally: _FitTally, result: StepResult | None
    ) -> None:
        unusable = {item.sample_id: item for item in given_up}
        for ref in window.refs:
            item = unusable.get(ref.sample_id)
            if item is None:
                self.progress.trained.add(ordinal_of(ref.sample_id))
            elif not item.lost:
                self.progress.quarantined.add(ordinal_of(ref.sample_id))
        samples, tokens = len(window.refs) - len(unusable), result.tokens if result else 0
        self.progress.samples += samples
        self.progress.tokens += tokens
        tally.samples += samples
        tally.tokens += tokens
        tally.lost += sum(item.lost for item in given_up)
        tally.given_up += [(item.sample_id, item.reason) for item in given_up]

    # --- reporting ----------------------------------------------------------------------------------------------

    def _record(
        self,
        loader: FeatureDataLoader,
        window: TrainingWindow,
        result: StepResult,
        tally: _FitTally,
        step_s: float,
    ) -> dict[str, Any]:
        seconds = max(step_s + window.wait_s, 1e-9)
        return {
            "step": self.progress.step,
            **result.record(),
            "samples_per_s": result.samples / seconds,
            "tokens_per_s": result.tokens / seconds,
            "data_wait_s": window.wait_s,
            "step_s": step_s,
            "in_flight": loader.in_flight,
            **{f"store_{name}": count for name, count in loader.store_trouble.items()},
            "sample_age_s": window.oldest_age_s(time.time()),
            "trained": self.progress.samples,
            "quarantined": len(self.progress.quarantined),
        }

    def _phase(self, phase: str) -> None:
        if self._observer is not None:
            self._observer.on_phase(phase, self.progress)

    def _on_wait(self) -> None:
        if self._observer is not None:
            self._observer.on_wait()

    def _outcome(self, reason: str, tally: _FitTally, unused: int) -> TrainOutcome:
        seconds = tally.seconds
        return TrainOutcome(
            reason=reason,
            steps=self.progress.step,
            samples=self.progress.samples,
            tokens=self.progress.tokens,
            quarantined=len(self.progress.quarantined),
            lost=tally.lost,
            unused=unused,
            steps_here=tally.steps,
            samples_here=tally.samples,
            tokens_here=tally.tokens,
            loss_first=self.progress.loss_first,
            loss_last=self.progress.loss_last,
            seconds=seconds,
            data_wait_s=tally.wait_s,
            samples_per_second=tally.samples / seconds if seconds else 0.0,
            tokens_per_second=tally.tokens / seconds if seconds else 0.0,
            checkpoint=self._saved.name if self._saved else None,
            given_up=tally.given_up,
        )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
