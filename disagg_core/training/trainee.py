"""One draft in training: its model, its optimizer step, its randomness and its counts.

A run trains one or more of them on the same windows. Each does what it would do alone: a window whose numbers are not
finite for one draft is left out of that draft's training, and of no other's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import ProcessGroup

from disagg_core.drafts.method import DraftModel
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.errors import TrainingDiverged
from disagg_core.training.checkpoint import DraftContent, DraftProgress, TrainerState, load_into
from disagg_core.training.checkpoint.document import OPTIMIZER_FILE, RNG_FILE
from disagg_core.training.inputs import DraftBatches
from disagg_core.training.randomness import RandomState
from disagg_core.training.state import gather_weights, optimizer_tensors, prepared_optimizer_tensors
from disagg_core.training.step import OptimizerStep, QueuedStep, StepResult
from disagg_core.training.window import TrainingWindow

_log = logging.getLogger(__name__)


class TrainedWindow:
    """A window that a draft's step was given to the device for; it is counted once, when its result is asked for."""

    def __init__(self, trainee: Trainee, queued: QueuedStep | None) -> None:
        """`queued` is None where there was nothing to train on."""
        self._trainee, self._queued = trainee, queued
        self._result: StepResult | None = None

    @property
    def counted(self) -> bool:
        """Whether its result was asked for; always, without anything to train on."""
        return self._queued is None

    def result(self) -> StepResult | None:
        """Return the figures, also where they are not finite and the weights stayed as they were.

        Waits for the device at the first call. None without anything to train on.
        """
        if self._queued is not None:
            self._result, self._queued = self._queued.result(), None
            self._trainee.count(self._result)
        return self._result

    def steps_after(self) -> int:
        """Return how many steps the draft has taken with this window."""
        self.result()
        return self._trainee.progress.step


@dataclass
class Trainee:
    """A draft and all that its training needs; the same calls are made on every rank.

    `folder` is where its part of a checkpoint lies, and what tells it from others in figures and messages; empty for
    the only draft of a run.
    """

    folder: str
    draft: DraftModel
    step: OptimizerStep
    random: RandomState
    progress: DraftProgress
    _last: TrainedWindow | None = None

    def train(self, batches: DraftBatches, *, samples: int, tokens: int) -> TrainedWindow:
        """Give the device an optimizer step on a window, of which this rank has `samples` and `tokens`.

        The window before is counted before this one is about to change the weights: the step has its right number.
        """
        started = time.monotonic()
        before = self._last
        with self.random.in_force():
            if before is None or before.counted:
                queued = self.step.run(batches, self.progress.step, samples=samples, tokens=tokens)
            else:
                recount = before.steps_after
                queued = self.step.run(batches, self.progress.step, samples=samples, tokens=tokens, recount=recount)
                before.result()  # nobody asked for it where this window has nothing to train on
        self.progress.seconds += time.monotonic() - started
        self._last = TrainedWindow(self, queued)
        return self._last

    def count(self, result: StepResult) -> None:
        """Count a window with this `result`."""
        progress = self.progress
        if not result.finite:
            progress.skipped += 1
            progress.skipped_in_row += 1
            progress.skipped_because = result.fault()
            _log.error("%sstep %d: a window is %s", self.speaking, progress.step, progress.skipped_because)
            return
        progress.step += 1
        progress.skipped_in_row = 0
        progress.loss_last = result.loss
        if progress.loss_first is None:
            progress.loss_first = result.loss

    @property
    def parameters(self) -> int:
        """How many are trained, over all ranks."""
        return sum(parameter.numel() for parameter in self.step.parameters.values())

    @property
    def speaking(self) -> str:
        """Beginning of what is said of it, where there are others."""
        return f"draft {self.folder}: " if self.folder else ""

    def check_skipped(self, allowed: int) -> None:
        """Raise `TrainingDiverged` if as many windows as `allowed` in a row gave numbers that are not finite."""
        if self.progress.skipped_in_row >= allowed:
            raise TrainingDiverged(
                f"{self.speaking}step {self.progress.step}: expected a finite loss and gradient, found "
                f"{self.progress.skipped_in_row} windows in a row without (training.max_diverged_windows); of the "
                f"last: {self.progress.skipped_because}; lower its learning rate, or look for samples with huge hidden "
                "states"
            )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """Return the draft in serving names, whole, fp32 and on the CPU, on rank 0; every rank must call it."""
        return gather_weights(self.draft, self.draft.serving_state_dict())

    def content(self) -> DraftContent:
        """Return its part of a checkpoint: the tensors themselves, sharded as they are."""
        optimizer = optimizer_tensors(self.draft, self.step.optimizer)
        return DraftContent(
            self.draft.serving_state_dict(), self.draft.config.to_dict(), optimizer, self.random.tensors()
        )

    def restore(self, path: Path, state: TrainerState, group: ProcessGroup | None) -> None:
        """Take weights, optimizer and random state from the checkpoint at `path`, and the counts that go with them.

        A collective of `group`; each rank reads the rows that it has.

        Raises:
            CheckpointError: its tensors are not this draft's.
        """

        def fill(file: str, tensors: Mapping[str, Tensor], what: str) -> None:
            load_into(path, str(Path(self.folder, file)), tensors, what, group)

        progress = state.drafts[self.folder]
        fill(CHECKPOINT_WEIGHTS, self.draft.serving_state_dict(), "draft tensors")
        if progress.step:
            fill(OPTIMIZER_FILE, prepared_optimizer_tensors(self.draft, self.step.optimizer), "optimizer state")
        self.random.load(load_file(path / self.folder / RNG_FILE))
        self.progress = msgspec.structs.replace(progress, skipped_in_row=0)


@dataclass(frozen=True)
class OpenWindow:
    """A window that is trained and not complete: its figures were not read."""

    window: TrainingWindow
    trained: Sequence[TrainedWindow]
    applied: list[int]  # how often each draft's weights were changed with it
    started: float
