"""Reads checkpoints: whole, or into the tensors of a trainer, of which each rank needs its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load

from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.errors import CheckpointError
from disagg_core.training.checkpoint.directory import read_state, verify_checkpoint
from disagg_core.training.checkpoint.document import (
    CONFIG_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    CheckpointContent,
    DraftContent,
)
from disagg_core.training.checkpoint.tensors import SafetensorsReader, keyed


def load_checkpoint(path: Path, *, identity: Mapping[str, str] | None = None) -> CheckpointContent:
    """Verify and read the checkpoint at `path`, whole; needs no process group.

    Raises:
        CheckpointError: incomplete, damaged, or made under another `identity` than the one given.
    """
    verify_checkpoint(path)
    state = read_state(path)
    if identity is not None:
        state.check_identity(identity, path)
    return CheckpointContent({folder: _load_draft(path / folder) for folder in state.drafts}, state)


def _load_draft(path: Path) -> DraftContent:
    return DraftContent(
        weights=load_file(path / CHECKPOINT_WEIGHTS),
        config=json.loads((path / CONFIG_FILE).read_text()),
        optimizer=load_file(path / OPTIMIZER_FILE),
        rng=load_file(path / RNG_FILE),
    )


def load_into(
    path: Path, file: str, tensors: Mapping[str, Tensor], what: str, group: distributed.ProcessGroup | None = None
) -> None:
    """Fill the `tensors`, whole ones or DTensors, with those of `file` in the checkpoint at `path`.

    A collective of `group`; None: of this process alone. `what` the tensors are is said where they are not those of
    the file.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape; or the file cannot be read.
    """
    reader = SafetensorsReader(path, [file])
    wanted = keyed({file: tensors})
    if wanted.keys() != reader.tensors.keys():
        missing, unknown = wanted.keys() - reader.tensors.keys(), reader.tensors.keys() - wanted.keys()
        raise CheckpointError(
            f"{path / file}: {what}: missing {sorted(missing)}, unknown {sorted(unknown)}; the draft section or "
            "training.optimizer of the run has changed"
        )
    for key, tensor in wanted.items():
        if tensor.shape != (found := reader.tensors[key].size):
            raise CheckpointError(f"{what} {key}: expected shape {list(tensor.shape)}, found {list(found)}")
    if not wanted:
        return
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        load(dict(wanted), storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        raise CheckpointError(f"{path / file}: rank {rank} cannot read it ({cause})") from cause
