"""Puts the consumer side together: channel and store in, trainer and loader out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.drafts.eagle3 import Eagle3Draft, Eagle3Loss
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.ordinals import OrdinalSet
from disagg_core.run_spec.document import TrainingSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training.distributed import Ranks, compute_dtype, shard
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.optimizer import Schedule
from disagg_core.training.step import OptimizerStep
from disagg_core.training.trainer import CheckpointPolicy, StepObserver, Trainer

COMPILED_MULTIPLE = 128
"""Compiled steps see lengths padded to a multiple of this, so that few shapes are compiled."""


def build_disagg_online_consumer(
    *,
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    draft: Eagle3Draft,
    lm_head: Tensor,
    section: TrainingSection,
    ttt_length: int,
    loss: LossSection | None = None,
    total_steps: int | None = None,
    ranks: Ranks | None = None,
    checkpoints: Path | None = None,
    keep: int = 2,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    observer: StepObserver | None = None,
) -> tuple[Trainer, FeatureDataLoader]:
    """Return ``(trainer, loader)``; ``trainer.fit(loader)`` trains `draft` on the stream until it ends.

    Call it on every rank, with the same arguments but `channel`, which rank 0 reads and the others leave None.
    Without torchrun and without a process group the process becomes the only rank of its own.

    Args:
        channel: the attempt's reference channel.
        store: this process's client of the feature store.
        draft: with its vocabulary map and embedding set, in fp32; sharded in place and moved to the rank's device.
        lm_head: the target's LM head [V, H_t], frozen.
        section: batch sizes, steps, rates and precision.
        ttt_length: test steps L.
        loss: loss options; by default those of the run document.
        total_steps: length of the schedule; `section.max_steps` if that is less; None: constant after warm-up.
        ranks: this process among the trainer's; by default joined as the environment says.
        checkpoints: directory of checkpoints. If it holds one, training continues there. None: nothing is saved.
        keep: checkpoints that stay besides step 0.
        seed: noted in checkpoints.
        identity: what must be equal for a checkpoint to be continued.
        observer: is told of every step on rank 0.

    Raises:
        CheckpointError: the newest checkpoint belongs to another run or draft.
    """
    ranks = ranks or Ranks.join(section.device)
    loss = loss or LossSection()
    steps = min((s for s in (total_steps, section.max_steps) if s is not None), default=None)
    saving = None
    if checkpoints is not None:
        saving = CheckpointPolicy(checkpoints, section.save_every_steps, keep, seed, dict(identity or {}), steps)
    step = _step(draft, lm_head, ranks, section, loss, ttt_length, steps)
    trainer = Trainer(step, draft, ranks=ranks, checkpoints=saving, max_steps=section.max_steps, observer=observer)
    trainer.restore_newest()
    return trainer, _loader(channel, store, ranks, section, loss, trainer.progress.trained)


def _step(
    draft: Eagle3Draft,
    lm_head: Tensor,
    ranks: Ranks,
    section: TrainingSection,
    loss: LossSection,
    ttt_length: int,
    steps: int | None,
) -> OptimizerStep:
    """Return the optimizer step over the loss module, moved to the rank's device and sharded."""
    recompute = section.activation_checkpointing
    module = Eagle3Loss(draft, lm_head, loss, ttt_length, activation_checkpointing=recompute).to(ranks.device)
    sharded = shard(module, ranks, compute_dtype(section.precision, ranks.device))
    if section.compile:
        module.compile(dynamic=True)
    schedule = Schedule(section.learning_rate, section.warmup_ratio, steps)
    return OptimizerStep(module, sharded, draft, ranks=ranks, section=section, loss=loss, schedule=schedule)


def _loader(
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    ranks: Ranks,
    section: TrainingSection,
    loss: LossSection,
    trained: OrdinalSet,
) -> FeatureDataLoader:
    """Return the loader of this rank's samples; `trained` is what the restored weights have seen."""
    return FeatureDataLoader(
        StreamingRefQueue(channel) if channel is not None else None,
        store,
        channel=channel,
        batch_size=section.batch_size,
        accumulation_steps=section.accumulation_steps,
        ranks=ranks,
        mask_mode=loss.mask_mode,
        by_length=loss.normalisation == "valid",
        prefetch_samples=section.prefetch_samples,
        pad_to_multiple_of=COMPILED_MULTIPLE if section.compile else 1,
        trained=trained,
    )
