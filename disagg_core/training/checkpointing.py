"""When a trainer saves and what it goes on from: the trainer's side of its checkpoints.

A save is started at a step boundary, staged, and written by a thread while training goes on. All ranks take its end at
one later boundary, so that an error of one is an error of all in the same step. What a checkpoint covers is known to be
safe only then; samples are acknowledged after their step all the same, because another attempt captures again what its
checkpoint does not cover.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from disagg_core.errors import CheckpointError
from disagg_core.ordinals import OrdinalSet
from disagg_core.training.checkpoint import (
    BestMeasured,
    CheckpointContent,
    CheckpointSaver,
    DataCursor,
    TrainerState,
    checkpoint_path,
    newest_complete,
    read_state,
)
from disagg_core.training.distributed import Ranks
from disagg_core.training.progress import CheckpointPolicy, TrainingProgress
from disagg_core.training.trainee import Trainee

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Boundary:
    """What tells one checkpoint's content from another's."""

    path: Path
    cursor: DataCursor
    bests: list[BestMeasured | None]


class Checkpointing:
    """Saves and restores what `trainees` and `progress` are; without a `policy` it does nothing.

    The same calls are made on every rank. `on_saving` is called where training waits for a save.
    """

    def __init__(
        self,
        policy: CheckpointPolicy | None,
        trainees: Sequence[Trainee],
        progress: TrainingProgress,
        *,
        ranks: Ranks,
        on_saving: Callable[[], None],
    ) -> None:
        self._policy = policy
        self._trainees = trainees
        self._progress = progress
        self._ranks = ranks
        self._on_saving = on_saving
        self._group = ranks.another_group() if policy is not None else None
        self._saver: CheckpointSaver | None = None
        self._started: _Boundary | None = None
        self._whole: _Boundary | None = None
        self.failed = False
        """Whether a save has failed, or is being started: what is in memory may be in the middle of something."""

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that is known to be whole, of this process's saves or the one it went on from."""
        return self._whole.path if self._whole is not None else None

    @property
    def due(self) -> bool:
        """Whether the present step is one that is saved."""
        return self.due_at(self._progress.step)

    def due_at(self, step: int) -> bool:
        """Whether optimizer step `step` is one that is saved."""
        return self._policy is not None and step % self._policy.every_steps == 0

    # --- saving -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to save this step boundary, if that is not done yet; an earlier save is waited for.

        A checkpoint of the same step with another cursor, or another word on which is the best, is replaced: a window
        without anything to train on is acknowledged all the same.

        Raises:
            CheckpointNotSaved: the earlier one could not be written.
        """
        policy = self._policy
        if policy is None:
            return
        wanted = self._boundary(policy)
        if wanted in (self._started, self._whole):
            return
        self.finish()
        self.failed = True
        drafts = {trainee.folder: trainee.content() for trainee in self._trainees}
        self._saver_of(policy).start(CheckpointContent(drafts, self._state(policy)))
        self.failed = False
        self._started = wanted

    def look(self) -> None:
        """Take the end of a save that all ranks are done with, if there is one.

        Raises:
            CheckpointNotSaved: it could not be written.
        """
        if self._saver is None or self._started is None:
            return
        if self._ranks.sum([float(self._saver.done)])[0] == self._ranks.size:
            self._take(self._saver)

    def finish(self) -> None:
        """Wait until what was started is on the disk.

        Raises:
            CheckpointNotSaved: it could not be written.
        """
        if self._saver is not None and self._started is not None:
            self._on_saving()
            self._take(self._saver)

    def close(self) -> None:
        """Let what was started come to its end, without raising what that is."""
        if self._saver is not None:
            self._saver.close()
        self._saver, self._started = None, None

    def _boundary(self, policy: CheckpointPolicy) -> _Boundary:
        progress = self._progress
        return _Boundary(
            checkpoint_path(policy.root, progress.step),
            progress.cursor(),
            [draft.best for draft in progress.drafts.values()],
        )

    def _saver_of(self, policy: CheckpointPolicy) -> CheckpointSaver:
        if self._saver is None:
            self._saver = CheckpointSaver(policy.root, keep=policy.keep, group=self._group, device=self._ranks.device)
        return self._saver

    def _take(self, saver: CheckpointSaver) -> None:
        started, self._started = self._started, None
        self.failed = True
        saver.take()
        self.failed = False
        self._whole = started

    def _state(self, policy: CheckpointPolicy) -> TrainerState:
        progress = self._progress
        return TrainerState(
            step=progress.step,
            samples=progress.samples,
            tokens=progress.tokens,
            seed=policy.seed,
            total_steps=policy.total_steps,
            identity=dict(policy.identity),
            cursor=progress.cursor(),
            drafts={folder: msgspec.structs.replace(own) for folder, own in progress.drafts.items()},
        )

    # --- going on ---------------------------------------------------------------------------------------------------

    def restore_newest(self) -> Path | None:
        """Go on from the newest whole checkpoint, if there is one, on every rank; return where it lies.

        Raises:
            CheckpointError: it belongs to another run, target or vocabulary map, or has other drafts.
        """
        if self._policy is None:
            return None
        newest = newest_complete(self._policy.root) if self._ranks.is_first else None
        name = self._ranks.broadcast(str(newest or "").encode()).decode()
        if not name:
            return None
        path = Path(name)
        state = read_state(path)
        state.check_identity(self._policy.identity, path)
        self._restore(path, state)
        self._whole = self._boundary(self._policy)
        _log.info("continuing from %s: %d samples trained", path, self._progress.samples)
        return path

    def _restore(self, path: Path, state: TrainerState) -> None:
        folders = [trainee.folder for trainee in self._trainees]
        if sorted(folders) != sorted(state.drafts):
            raise CheckpointError(f"expected a checkpoint of the drafts {folders}, found {sorted(state.drafts)}")
        for trainee in self._trainees:
            trainee.restore(path, state, self._group)
        progress = self._progress
        progress.step, progress.samples, progress.tokens = state.step, state.samples, state.tokens
        progress.drafts = {trainee.folder: trainee.progress for trainee in self._trainees}
        for ordinals, ranges in (
            (progress.trained, state.cursor.trained),
            (progress.quarantined, state.cursor.quarantined),
        ):
            for ordinal in OrdinalSet(ranges):
                ordinals.add(ordinal)
