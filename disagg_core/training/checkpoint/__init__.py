"""Checkpoints: one atomic unit of weights, optimizer, schedule, random state and data cursor.

::

    checkpoints/step-<k>/
      draft.safetensors       draft in serving names, fp32 masters, with d2t and t2d, without the target's embedding
      config.json             the draft's serving config
      optimizer.safetensors   <parameter>.exp_avg, .exp_avg_sq, .step
      rng.safetensors         states of the random generators
      trainer.json            `TrainerState`: step, schedule, counts, identity and the data cursor
      manifest.json           size and SHA-256 of each file above; written last

Of several drafts each has the first four files in a folder of its name: they are of one step boundary and one cursor.

`torch.distributed.checkpoint` plans who writes and who reads what: each rank writes the rows that it has into the one
file, and reads those that it needs, so the files are the same for any number of ranks, and what reads a draft needs no
process group. Nothing is pickled in them.

A checkpoint is written beside its place, synced, and renamed into it, so a directory called ``step-<k>`` is whole
unless the disk damaged it; readers check the manifest all the same. Weights and cursor are never apart: that is what
makes "nothing is trained twice with respect to the restored weights" true. ``step-0`` holds the untrained draft and is
never pruned, and neither is one that has a draft at its best on held-out samples.
"""

from disagg_core.training.checkpoint.directory import (
    checkpoint_path,
    covered_ordinals,
    kept_checkpoints,
    newest_complete,
    prune_checkpoints,
    read_state,
    untrained_checkpoint,
    verify_checkpoint,
)
from disagg_core.training.checkpoint.document import (
    BestMeasured,
    CheckpointContent,
    DataCursor,
    DraftContent,
    DraftProgress,
    TrainerState,
)
from disagg_core.training.checkpoint.loading import load_checkpoint, load_into
from disagg_core.training.checkpoint.saving import CheckpointSaver, save_checkpoint

__all__ = [
    "BestMeasured",
    "CheckpointContent",
    "CheckpointSaver",
    "DataCursor",
    "DraftContent",
    "DraftProgress",
    "TrainerState",
    "checkpoint_path",
    "covered_ordinals",
    "kept_checkpoints",
    "load_checkpoint",
    "load_into",
    "newest_complete",
    "prune_checkpoints",
    "read_state",
    "save_checkpoint",
    "untrained_checkpoint",
    "verify_checkpoint",
]
