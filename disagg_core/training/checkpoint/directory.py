"""Where checkpoints lie: found, verified, and pruned."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Collection
from pathlib import Path

import msgspec

from disagg_core.errors import CheckpointError
from disagg_core.ordinals import OrdinalSet
from disagg_core.training.checkpoint.document import (
    FORMAT,
    MANIFEST_FILE,
    READABLE,
    STATE_FILE,
    DataCursor,
    FileEntry,
    Manifest,
    TrainerState,
)

_READ_PAUSES_S = (1.0, 4.0)
"""Between tries to read a checkpoint: a file handle that went stale is looked up anew, a mount may come back."""
_STEP_DIR = re.compile(r"^step-(\d+)$")
_log = logging.getLogger(__name__)


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the directory of step `step`'s checkpoint below `root`."""
    return root / f"step-{step}"


def untrained_checkpoint(root: Path) -> Path:
    """Return the directory of the checkpoint below `root` that holds the draft before its first step."""
    return checkpoint_path(root, 0)


def kept_checkpoints(root: Path, count: int) -> list[Path]:
    """Return the `count` newest checkpoints below `root`, newest first, and those with a draft at its best.

    They are not verified.
    """
    found = _by_step(root)
    best = _best_known(found)
    return [path for number, (step, path) in enumerate(found) if number < count or step in best]


def _best_known(found: list[tuple[int, Path]]) -> set[int]:
    """Return the steps that the newest checkpoint says are the best."""
    for _, path in found:
        try:
            return read_state(path).best_steps
        except CheckpointError as error:
            _log.warning("which checkpoint is the best is asked of an older one: %s", error)
    return set()


def entry_of(path: Path) -> FileEntry:
    """Return what the manifest says of the file at `path`."""
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def prune_checkpoints(root: Path, *, keep: int, best: Collection[int] = ()) -> list[Path]:
    """Remove all checkpoints but step 0, the `keep` newest and those of the `best` steps, and what writers have left.

    Returns what was removed. The newest are kept by step number, whether intact or not: `newest_complete` is asked
    before training starts, so a damaged one is replaced as training passes it.
    """
    removed = [path for step, path in _by_step(root)[keep:] if step > 0 and step not in best]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed + remove_unfinished(root)


def remove_unfinished(root: Path) -> list[Path]:
    """Remove what writers that died have left below `root`; return it."""
    left = [path for path in root.glob(".step-*.tmp") if path.is_dir()]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return left


def _by_step(root: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of everything called step-<k> below `root`, newest first."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:  # which knows a directory from its entry; to look at it may be an error
        found = [(match, entry) for entry in entries if (match := _STEP_DIR.match(entry.name)) and entry.is_dir()]
    return sorted(((int(match[1]), root / entry.name) for match, entry in found), reverse=True)


def verify_checkpoint(path: Path) -> int:
    """Check every file of the checkpoint at `path` against its manifest; return the checkpoint's step.

    Raises:
        CheckpointError: no manifest, another format, or a file whose size or SHA-256 is not the manifest's.
        OSError: it cannot be read at present, whether it is whole or not.
    """
    manifest_path = path / MANIFEST_FILE
    if not manifest_path.is_file():
        raise CheckpointError(f"{path}: expected {MANIFEST_FILE}, found none: the checkpoint is incomplete")
    try:
        manifest = msgspec.json.decode(manifest_path.read_bytes(), type=Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{manifest_path}: cannot be read ({error}); use an older checkpoint") from error
    if manifest.format not in READABLE:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {manifest.format}")
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: listed in {MANIFEST_FILE} but not there; use an older checkpoint")
        if file.stat().st_size != expected.size or (found := entry_of(file)) != expected:
            size = file.stat().st_size
            detail = f"{size} bytes" if size != expected.size else f"SHA-256 {found.sha256}"
            wanted = f"{expected.size} bytes" if size != expected.size else f"SHA-256 {expected.sha256}"
            raise CheckpointError(f"{file}: expected {wanted}, found {detail}; use an older checkpoint")
    return manifest.step


def newest_complete(root: Path) -> Path | None:
    """Return the newest checkpoint below `root` that is whole, or None; those that are not are skipped, and logged.

    One that the file system does not give out (EIO, ESTALE) is tried a few times, then skipped as well.

    Raises:
        CheckpointError: there are checkpoints, but none that can be read. To begin anew would throw them away.
    """
    unreadable: OSError | None = None
    for _step, path in _by_step(root):
        try:
            _verify_patiently(path)
        except CheckpointError as error:
            _log.warning("skipping a damaged checkpoint: %s", error)
        except OSError as error:
            _log.error("skipping a checkpoint that cannot be read: %s: %s", path, error)
            unreadable = error
        else:
            return path
    if unreadable is not None:
        raise CheckpointError(
            f"{root}: expected a checkpoint to go on from, found none that can be read ({unreadable}); see to the "
            "disk or mount and resume, or remove the checkpoints to begin anew"
        ) from unreadable
    return None


def _verify_patiently(path: Path) -> None:
    for pause_s in _READ_PAUSES_S:
        try:
            verify_checkpoint(path)
        except OSError as error:
            _log.warning("%s cannot be read, trying again: %s", path, error)
            time.sleep(pause_s)
        else:
            return
    verify_checkpoint(path)


def read_state(path: Path) -> TrainerState:
    """Return the `TrainerState` of the checkpoint at `path`, without its tensors.

    Raises:
        CheckpointError: it is not there or cannot be read.
    """
    try:
        return msgspec.json.decode((path / STATE_FILE).read_bytes(), type=TrainerState)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path / STATE_FILE}: cannot be read ({error}); use an older checkpoint") from error


def covered_ordinals(root: Path) -> OrdinalSet:
    """Return the prompts that the newest whole checkpoint below `root` covers; empty without one.

    These are what was trained or given up for good: an attempt that restores the checkpoint must not capture them.
    """
    newest = newest_complete(root)
    cursor = read_state(newest).cursor if newest is not None else DataCursor()
    return OrdinalSet([*cursor.trained, *cursor.quarantined])
