"""Writes checkpoints: at once, or by a thread of its own while training goes on.

What is saved in the background is staged first: copied to host memory, page-locked where a GPU copies to it, while
training waits. From then on training may change the originals.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.errors import CheckpointNotSaved, RoleFailed, classify
from disagg_core.training.checkpoint.directory import checkpoint_path, entry_of, prune_checkpoints, remove_unfinished
from disagg_core.training.checkpoint.document import (
    CONFIG_FILE,
    FORMAT,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    RNG_FILE,
    STATE_FILE,
    CheckpointContent,
    Manifest,
)
from disagg_core.training.checkpoint.tensors import SafetensorsWriter, keyed

_FILES = {"weights": CHECKPOINT_WEIGHTS, "optimizer": OPTIMIZER_FILE, "rng": RNG_FILE}
"""The tensors of a `DraftContent` and their files."""
_log = logging.getLogger(__name__)


class CheckpointSaver:
    """Saves below `root` in the background, one checkpoint at a time; every rank has one, and calls the same.

    `group` is a process group of its own over all ranks: a thread talks in it while training talks in others.
    """

    def __init__(self, root: Path, *, keep: int, group: distributed.ProcessGroup | None, device: torch.device) -> None:
        self._root = root
        self._keep = keep
        self._group = group
        on_gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    @property
    def done(self) -> bool:
        """Whether this rank is done with what was started."""
        return self._running is None or self._running.done()

    def start(self, content: CheckpointContent) -> None:
        """Stage `content` and begin to write it. The end of an earlier save must have been taken."""
        assert self._running is None
        staged = _staged(content, self._stager)
        self._running = self._thread.submit(save_checkpoint, self._root, staged, keep=self._keep, group=self._group)

    def take(self) -> Path:
        """Wait for the end of the save that was started; return its checkpoint.

        Raises:
            CheckpointNotSaved: as `save_checkpoint`, on all ranks.
        """
        assert self._running is not None
        running, self._running = self._running, None
        return running.result()

    def close(self) -> None:
        """Wait for the end of what was started, however it ends, and let the staging memory go."""
        self._thread.shutdown(wait=True)
        if self._running is not None and (error := self._running.exception()) is not None:
            _log.error("the checkpoint that was being written is not whole: %s", error)
        self._running = None
        self._stager.close()


def _staged(content: CheckpointContent, stager: DefaultStager) -> CheckpointContent:
    """Return `content` with copies of its tensors in host memory."""
    groups = {(folder, kind): getattr(own, kind) for folder, own in content.drafts.items() for kind in _FILES}
    flat = {f"{folder}/{kind}/{name}": tensor for (folder, kind), own in groups.items() for name, tensor in own.items()}
    copies = stager.stage(flat)
    assert isinstance(copies, dict)
    drafts = {
        folder: replace(
            own, **{k: {name: copies[f"{folder}/{k}/{name}"] for name in groups[folder, k]} for k in _FILES}
        )
        for folder, own in content.drafts.items()
    }
    return CheckpointContent(drafts, content.state)


def _tensors_by_file(content: CheckpointContent) -> dict[str, Mapping[str, Tensor]]:
    return {
        str(Path(folder, file)): getattr(own, kind)
        for folder, own in content.drafts.items()
        for kind, file in _FILES.items()
    }


def save_checkpoint(
    root: Path, content: CheckpointContent, *, keep: int, group: distributed.ProcessGroup | None = None
) -> Path:
    """Write `content` to ``<root>/step-<k>`` as a whole, then prune what `prune_checkpoints` lets go.

    A collective of `group`, of whose ranks each has its rows of the DTensors; None: of this process alone. Returns the
    checkpoint's directory, which is on the disk then, on every rank. A damaged or older checkpoint of the same step is
    replaced.

    Raises:
        CheckpointNotSaved: it could not be written, as on a full disk; nothing of it stays, and the others do.
        RoleFailed: on the other ranks, where one of them failed in another way.
    """
    final = checkpoint_path(root, content.state.step)
    draft = f".{final.name}.{os.getpid()}.tmp"
    tensors = _tensors_by_file(content)
    coordinator = group is None or distributed.get_rank(group) == 0

    def finish(place: Path) -> None:
        _complete(place, content)
        _put_in_place(place, final)

    writer = SafetensorsWriter(root, draft, list(tensors), prepare=lambda: _make_room(root), finish=finish)
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    try:
        save(keyed(tensors), storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())  # all ranks know of all failures; the first one counts
        failure = _failure_of(rank, cause, final, content, group)
        raise failure from (None if failure is cause else cause)
    finally:
        if coordinator:
            shutil.rmtree(root / draft, ignore_errors=True)
    if coordinator:
        prune_checkpoints(root, keep=keep, best=content.state.best_steps)
    return final


def _make_room(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    remove_unfinished(root)  # it may be what fills the disk


def _complete(place: Path, content: CheckpointContent) -> None:
    """Add to the tensors in `place` all that is no tensor, the manifest last, down to the disk."""
    for folder, own in content.drafts.items():
        (place / folder / CONFIG_FILE).write_text(json.dumps(own.config, indent=2) + "\n")
    (place / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(content.state), indent=1))
    paths = sorted(place.rglob("*"))
    files = {str(path.relative_to(place)): entry_of(path) for path in paths if path.is_file()}
    for path in paths:
        _sync(path)
    manifest = Manifest(FORMAT, content.state.step, files)
    (place / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _sync(place / MANIFEST_FILE)
    _sync(place)


def _put_in_place(place: Path, final: Path) -> None:
    """Rename `place` to `final`; what is there is set aside: removing it takes time, in which there would be none."""
    aside = place.with_suffix(".replaced.tmp")
    if final.exists():
        final.rename(aside)
    try:
        place.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    _sync(final.parent)


def _failure_of(
    rank: int, cause: BaseException, final: Path, content: CheckpointContent, group: distributed.ProcessGroup | None
) -> BaseException:
    """Return what this rank raises for the failure of `rank`."""
    if isinstance(cause, OSError):
        return CheckpointNotSaved(_why_not_saved(final, content, cause))
    if group is None or distributed.get_rank(group) == rank:
        return cause
    return RoleFailed(f"rank {rank} failed: {type(cause).__name__}: {cause}", classify(cause))


def _why_not_saved(final: Path, content: CheckpointContent, error: Exception) -> str:
    groups = _tensors_by_file(content).values()
    needed = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())
    try:
        free = f"{shutil.disk_usage(final.parent).free} bytes are free there"
    except OSError as unknown:
        free = f"how much is free there cannot be told ({unknown})"
    return (
        f"{final}: the checkpoint could not be written ({error}): it needs {needed} bytes, {free}; make room (a run "
        "needs it for archive.keep + 1 of them, the untrained draft, and one of each draft's best with "
        "training.heldout) and resume"
    )


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
