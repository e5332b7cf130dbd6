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

A checkpoint is written beside its place, synced, and renamed into it, so a directory called ``step-<k>`` is whole
unless the disk damaged it; readers check the manifest all the same. Weights and cursor are never apart: that is what
makes "nothing is trained twice with respect to the restored weights" true. ``step-0`` holds the untrained draft and is
never pruned. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS, save_tensors
from disagg_core.errors import CheckpointError, CheckpointNotSaved
from disagg_core.ordinals import OrdinalSet

FORMAT = 2
CONFIG_FILE = "config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"

_READ_PAUSES_S = (1.0, 4.0)
"""Between tries to read a checkpoint: a file handle that went stale is looked up anew, a mount may come back."""
_STEP_DIR = re.compile(r"^step-(\d+)$")
_log = logging.getLogger(__name__)


class DataCursor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which prompt ordinals the weights have seen, as closed ranges, and which were given up (never in both)."""

    trained: list[tuple[int, int]] = []
    quarantined: list[tuple[int, int]] = []


class DraftProgress(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is one draft's own: its optimizer steps since the run began, and windows that were left out in its training.

    A window is `skipped` where its loss or gradient is not finite, so many of the last ones `skipped_in_row`.
    `seconds` are those that its steps took.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    skipped_because: str = ""
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0


class TrainerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a checkpoint that is not a tensor.

    `samples` and `tokens` count what was trained since the run began; `identity` names what must be equal for the
    weights to be continued (run, target, tokenizer, vocabulary map); `total_steps` is the schedule's length, None
    where it is not known. `drafts` has each draft's own progress by its folder, which is empty for an only draft.
    """

    step: int
    samples: int
    tokens: int
    seed: int
    total_steps: int | None
    identity: dict[str, str]
    cursor: DataCursor
    drafts: dict[str, DraftProgress]


class _FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    step: int
    files: dict[str, _FileEntry]


@dataclass(frozen=True)
class DraftContent:
    """One draft's part of a checkpoint in memory. Tensors are whole (not sharded) and on the CPU."""

    weights: dict[str, Tensor]
    config: dict[str, Any]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointContent:
    """A checkpoint in memory: `drafts` by folder, the same ones as in `state`."""

    drafts: dict[str, DraftContent]
    state: TrainerState


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the directory of step `step`'s checkpoint below `root`."""
    return root / f"step-{step}"


def untrained_checkpoint(root: Path) -> Path:
    """Return the directory of the checkpoint below `root` that holds the draft before its first step."""
    return checkpoint_path(root, 0)


def newest_checkpoints(root: Path, count: int) -> list[Path]:
    """Return the `count` newest checkpoints below `root`, by step number, newest first; they are not verified."""
    return [path for _, path in _by_step(root)[:count]]


def save_checkpoint(root: Path, content: CheckpointContent, *, keep: int) -> Path:
    """Write `content` to ``<root>/step-<k>`` as a whole, then prune all but the `keep` newest (and step 0).

    Returns the checkpoint's directory. A damaged or older checkpoint of the same step is replaced.

    Raises:
        CheckpointNotSaved: it could not be written, as on a full disk; nothing of it stays, and the others do.
    """
    final = checkpoint_path(root, content.state.step)
    draft = root / f".{final.name}.{os.getpid()}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(root)  # it may be what fills the disk
        _write(draft, content)
        _put_in_place(draft, final)
    except (OSError, SafetensorError) as error:
        raise CheckpointNotSaved(_why_not_saved(final, content, error)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    prune_checkpoints(root, keep=keep)
    return final


def _write(draft: Path, content: CheckpointContent) -> None:
    """Write all files of `content` into the new directory `draft`, the manifest last, down to the disk."""
    draft.mkdir()
    for folder, own in content.drafts.items():
        place = draft / folder
        place.mkdir(exist_ok=True)
        save_tensors(own.weights, place / CHECKPOINT_WEIGHTS, {"format": "pt"})
        save_tensors(own.optimizer, place / OPTIMIZER_FILE, {})
        save_tensors(own.rng, place / RNG_FILE, {})
        (place / CONFIG_FILE).write_text(json.dumps(own.config, indent=2) + "\n")
    (draft / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(content.state), indent=1))
    paths = sorted(draft.rglob("*"))
    files = {str(path.relative_to(draft)): _entry_of(path) for path in paths if path.is_file()}
    for path in paths:
        _sync(path)
    manifest = _Manifest(FORMAT, content.state.step, files)
    (draft / MANIFEST_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    _sync(draft / MANIFEST_FILE)
    _sync(draft)


def _put_in_place(draft: Path, final: Path) -> None:
    """Rename `draft` to `final`; what is there is set aside: removing it takes time, in which there would be none."""
    aside = draft.with_suffix(".replaced.tmp")
    if final.exists():
        final.rename(aside)
    try:
        draft.rename(final)
    except OSError:
        if aside.exists():
            aside.rename(final)
        raise
    _sync(final.parent)


def _why_not_saved(final: Path, content: CheckpointContent, error: Exception) -> str:
    groups = [group for own in content.drafts.values() for group in (own.weights, own.optimizer, own.rng)]
    needed = sum(tensor.numel() * tensor.element_size() for group in groups for tensor in group.values())
    try:
        free = f"{shutil.disk_usage(final.parent).free} bytes are free there"
    except OSError as unknown:
        free = f"how much is free there cannot be told ({unknown})"
    return (
        f"{final}: the checkpoint could not be written ({error}): it needs {needed} bytes, {free}; make room (a run "
        "needs it for archive.keep + 2 of them) and resume"
    )


def _entry_of(path: Path) -> _FileEntry:
    with path.open("rb") as file:
        return _FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune_checkpoints(root: Path, *, keep: int) -> list[Path]:
    """Remove all checkpoints but step 0 and the `keep` newest, and what writers that died have left.

    Returns what was removed. Only the newest are kept by step number, whether intact or not: `newest_complete` is
    asked before training starts, so a damaged one is replaced as training passes it.
    """
    removed = [path for step, path in _by_step(root)[keep:] if step > 0]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed + _remove_unfinished(root)


def _remove_unfinished(root: Path) -> list[Path]:
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
        manifest = msgspec.json.decode(manifest_path.read_bytes(), type=_Manifest)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{manifest_path}: cannot be read ({error}); use an older checkpoint") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{path}: expected checkpoint format {FORMAT}, found {manifest.format}")
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: listed in {MANIFEST_FILE} but not there; use an older checkpoint")
        if file.stat().st_size != expected.size or (found := _entry_of(file)) != expected:
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


def load_checkpoint(path: Path, *, identity: Mapping[str, str] | None = None, verify: bool = True) -> CheckpointContent:
    """Verify and read the checkpoint at `path`; `verify` is False where another rank has done it just now.

    Raises:
        CheckpointError: incomplete, damaged, or made under another `identity` than the one given.
    """
    if verify:
        verify_checkpoint(path)
    state = read_state(path)
    if identity is not None and state.identity != dict(identity):
        differing = sorted(
            name for name in {*identity, *state.identity} if identity.get(name) != state.identity.get(name)
        )
        details = ", ".join(f"{n}: expected {identity.get(n)!r}, found {state.identity.get(n)!r}" for n in differing)
        raise CheckpointError(
            f"{path} belongs to another run ({details}); use a new run id, or draft.init_from with an export"
        )
    return CheckpointContent({folder: _load_draft(path / folder) for folder in state.drafts}, state)


def _load_draft(path: Path) -> DraftContent:
    return DraftContent(
        weights=load_file(path / CHECKPOINT_WEIGHTS),
        config=json.loads((path / CONFIG_FILE).read_text()),
        optimizer=load_file(path / OPTIMIZER_FILE),
        rng=load_file(path / RNG_FILE),
    )


def covered_ordinals(root: Path) -> OrdinalSet:
    """Return the prompts that the newest whole checkpoint below `root` covers; empty without one.

    These are what was trained or given up for good: an attempt that restores the checkpoint must not capture them.
    """
    newest = newest_complete(root)
    cursor = read_state(newest).cursor if newest is not None else DataCursor()
    return OrdinalSet([*cursor.trained, *cursor.quarantined])
