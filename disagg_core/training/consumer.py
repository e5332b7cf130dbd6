"""Puts the consumer side together: channel and store in, trainer and loader out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.drafts.context import Context
from disagg_core.drafts.method import Batcher, DraftModel, FrozenParts
from disagg_core.drafts.registry import method_of
from disagg_core.ordinals import OrdinalSet
from disagg_core.run_spec.document import TrainingSection
from disagg_core.run_spec.draft import DraftSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training.checkpoint import DraftProgress
from disagg_core.training.distributed import Ranks, compute_dtype, shard
from disagg_core.training.heldout import HeldOut, HeldOutPlan
from disagg_core.training.inputs import DraftInput, Selection
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.optimizer import Schedule
from disagg_core.training.phase_clock import PhaseClock
from disagg_core.training.progress import CheckpointPolicy
from disagg_core.training.randomness import RandomState
from disagg_core.training.step import OptimizerStep
from disagg_core.training.trainee import Trainee
from disagg_core.training.trainer import StepObserver, Trainer

COMPILED_MULTIPLE = 128
"""Compiled steps see lengths padded to a multiple of this, so that few shapes are compiled."""


@dataclass(frozen=True)
class DraftToTrain:
    """A draft in fp32, attached to the target's parts; it is sharded in place and moved to the rank's device.

    `options` are its section of the run document. `folder` is where its part of a checkpoint lies, empty for an only
    draft; `selection` what it reads of the captured samples, None if it reads all of them.
    """

    model: DraftModel
    options: DraftSection
    folder: str = ""
    selection: Selection | None = None


def build_disagg_online_consumer(
    *,
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    drafts: Sequence[DraftToTrain],
    parts: FrozenParts,
    section: TrainingSection,
    total_steps: int | None = None,
    ranks: Ranks | None = None,
    checkpoints: Path | None = None,
    keep: int = 2,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    heldout: HeldOutPlan | None = None,
    observer: StepObserver | None = None,
    on_progress: Callable[[str], None] = lambda what: None,
) -> tuple[Trainer, FeatureDataLoader]:
    """Return ``(trainer, loader)``; ``trainer.fit(loader)`` trains the `drafts` on the stream until it ends.

    Call it on every rank, with the same arguments but `channel`, which rank 0 reads and the others leave None.

    Args:
        channel: the attempt's reference channel.
        store: this process's client of the feature store.
        drafts: at least one; each in another folder.
        parts: the target's frozen embedding and LM head [V, H_t].
        section: batch sizes, steps, rates and precision.
        total_steps: length of the schedule; `section.max_steps` if that is less; None: constant after warm-up.
        ranks: this process among the trainer's; by default as the environment says, without torchrun the only one.
        checkpoints: directory of checkpoints. If it holds one, training continues there. None: nothing is saved.
        keep: checkpoints that stay besides step 0.
        seed: what the randomness of a step follows from. Checkpoints note it; one of another `identity` is refused.
        heldout: what the drafts are measured on while they are trained, if they are.
        observer: is told of every step on rank 0; `on_progress`, on every rank, of all that counts as getting on.

    Raises:
        CheckpointError: the newest checkpoint belongs to another run or other drafts.
        BadInput: `section.context_parallel` does not divide the number of ranks.
    """
    ranks = (ranks or Ranks.join(section.device)).sharing_context(section.context_parallel)
    clock = PhaseClock(ranks.device)
    pairs = [(d, method_of(d.model.method).batcher(d.options, d.model.config, seed=seed)) for d in drafts]
    steps = min((s for s in (total_steps, section.max_steps) if s is not None), default=None)
    every, named = section.save_every_steps, dict(identity or {})
    saving = CheckpointPolicy(checkpoints, every, keep, seed, named, steps) if checkpoints is not None else None
    trainees = [_trainee(*pair, parts, ranks, section, steps, seed, clock) for pair in pairs]
    inputs = [input_of(*pair, section, ranks.context) for pair in pairs]
    trainer = Trainer(
        trainees,
        ranks=ranks,
        checkpoints=saving,
        max_steps=section.max_steps,
        max_diverged_windows=section.max_diverged_windows,
        heldout=HeldOut(heldout, trainees, inputs, ranks=ranks, batch_size=section.batch_size) if heldout else None,
        observer=observer,
        on_progress=on_progress,
        clock=clock,
    )
    trainer.restore_newest()
    return trainer, _loader(channel, store, inputs, ranks, section, trained=trainer.progress.trained)


def input_of(
    draft: DraftToTrain, batcher: Batcher, section: TrainingSection, context: Context | None = None
) -> DraftInput:
    """Return what a draft's batches are made of, and how."""
    multiple_of = COMPILED_MULTIPLE if section.compile else 1
    return DraftInput(batcher, draft.selection, multiple_of, section.packing, context)


def _loader(
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    inputs: Sequence[DraftInput],
    ranks: Ranks,
    section: TrainingSection,
    *,
    trained: OrdinalSet,
) -> FeatureDataLoader:
    """Return the loader of the stream's samples, without those that are `trained` already."""
    return FeatureDataLoader(
        StreamingRefQueue(channel) if channel is not None else None,
        store,
        inputs=inputs,
        channel=channel,
        batch_size=section.batch_size,
        accumulation_steps=section.accumulation_steps,
        ranks=ranks,
        prefetch_samples=section.prefetch_samples,
        pack_tokens=section.pack_tokens,
        trained=trained,
    )


def _trainee(
    draft: DraftToTrain,
    batcher: Batcher,
    parts: FrozenParts,
    ranks: Ranks,
    section: TrainingSection,
    steps: int | None,
    seed: int,
    clock: PhaseClock,
) -> Trainee:
    """Return the draft with its optimizer step, before any training."""
    step = optimizer_step_of(draft, parts, ranks, section, batcher, steps, clock)
    return Trainee(draft.folder, draft.model, step, RandomState(seed, ranks.device), DraftProgress())


def optimizer_step_of(
    draft: DraftToTrain,
    parts: FrozenParts,
    ranks: Ranks,
    section: TrainingSection,
    batcher: Batcher,
    steps: int | None,
    clock: PhaseClock,
) -> OptimizerStep:
    """Return the optimizer step over the loss module, moved to the rank's device and sharded."""
    method, options = method_of(draft.model.method), draft.options
    module = method.loss(draft.model, parts, options, activation_checkpointing=section.activation_checkpointing)
    sharded = shard(module.to(ranks.device), ranks, compute_dtype(section.precision, ranks.device))
    if section.compile:
        module.compile(dynamic=True)
    schedule = Schedule(options.learning_rate or section.learning_rate, section.warmup_ratio, steps)
    return OptimizerStep(
        module,
        sharded,
        draft.model,
        method=method,
        batcher=batcher,
        ranks=ranks,
        section=section,
        schedule=schedule,
        clock=clock,
    )
