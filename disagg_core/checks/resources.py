"""What a run needs on disk, compared with what is there before it starts."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from disagg_core.drafts.method import DraftConfig
from disagg_core.errors import BadInput
from disagg_core.report.archive import local_directory
from disagg_core.run.plan import PlannedDraft, RunPlan

_CHECKPOINT_BYTES = 3 * 4
"""Of a parameter: its fp32 master and AdamW's two moments."""
_EXPORT_BYTES = 2
_BESIDES = 64 * 1024**2
"""Logs, metrics and the vocabulary map."""
_UNPRUNED = 2
"""Checkpoints besides those that are kept: the untrained draft, and the one that is being written."""


class DiskTooSmall(BadInput):
    """A run would not fit on its disk: what it needs, what for, and what is free are named."""


def check_disk(plan: RunPlan, drafts: Sequence[tuple[PlannedDraft, DraftConfig]], archive: str | None) -> None:
    """Check that checkpoints, exports and archive of `drafts` fit; what the run has written already counts.

    `archive` is a directory or URL; None leaves it out.

    Raises:
        DiskTooSmall: they do not.
    """
    parameters = sum(draft.method.parameters(config) for draft, config in drafts)
    keep = plan.spec.archive.keep
    checkpoint, export = parameters * _CHECKPOINT_BYTES, parameters * _EXPORT_BYTES
    needs: dict[Path, dict[str, int]] = defaultdict(dict)
    heldout = plan.spec.training.heldout
    held_out = heldout.prompts * plan.max_sample_bytes if heldout is not None else 0
    best = len(drafts) if heldout is not None else 0
    count = keep + _UNPRUNED + best
    said = f"archive.keep + {_UNPRUNED}" + (f", and {best} for the best" if best else "")
    needs[plan.root] = {
        f"{count} checkpoints of {_gib(checkpoint)} ({said})": count * checkpoint,
        f"an export of {_gib(export)}": export,
        "logs and metrics": _BESIDES + held_out,
    }
    if archive is not None and (directory := local_directory(archive)) is not None:
        archived = (keep + best) * checkpoint + export
        needs[directory] = {f"an archive of {_gib(archived)}": archived}
    _compare(needs)


def _compare(needs: dict[Path, dict[str, int]]) -> None:
    """Compare the `needs` of directories that may share a disk with what is free on each."""
    disks: dict[int, list[Path]] = defaultdict(list)
    for directory in needs:
        disks[existing(directory).stat().st_dev].append(directory)
    for directories in disks.values():
        parts = {what: size for directory in directories for what, size in needs[directory].items()}
        written = sum(_size(directory) for directory in directories)
        wanted = max(0, sum(parts.values()) - written)
        free = shutil.disk_usage(existing(directories[0])).free
        if wanted > free:
            raise DiskTooSmall(
                f"{directories[0]}: expected {_gib(wanted)} free for {', '.join(parts)}, found {_gib(free)}; "
                "make room, lower archive.keep, or move DRAFTLINE_HOME or archive.url to a larger disk"
            )


def existing(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / 1024**2:.1f} MiB"
