"""What a run needs on disk, compared with what is there before it starts."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_core.drafts.cost import trained_bytes
from disagg_core.drafts.method import DraftConfig
from disagg_core.errors import BadInput
from disagg_core.report.archive import local_directory
from disagg_core.run.plan import PlannedDraft, RunPlan

_EXPORT_BYTES = 2
"""Of a parameter."""
_BESIDES = 64 * 1024**2
"""Logs, metrics and the vocabulary map."""
_WRITTEN = 1
"""Checkpoints besides those that are kept: the one that is being written."""


class DiskTooSmall(BadInput):
    """A run would not fit on its disk: what it needs, what for, and what is free are named."""


def check_disk(
    plan: RunPlan,
    drafts: Sequence[tuple[PlannedDraft, DraftConfig]],
    *,
    archive: str | None = None,
    registry: str | None = None,
) -> None:
    """Check that checkpoints, exports, archive and version of `drafts` fit; what the run has written already counts.

    `archive`, below which archives lie, and `registry` are directories or URLs; None leaves one out.

    Raises:
        DiskTooSmall: they do not.
    """
    sizes = _Sizes.of(plan, drafts)
    needs = [_Need(plan.root, what, size, own=True) for what, size in _needs_of_run(plan, sizes).items()]
    if archive is not None and (directory := local_directory(archive)) is not None:
        size = (plan.spec.archive.keep + sizes.best) * sizes.checkpoint + sizes.export
        needs.append(_Need(directory / plan.run_id, f"an archive of {_gib(size)}", size, own=True))
    if registry is not None and (directory := local_directory(registry)) is not None:
        size = sizes.masters + sizes.exports
        needs.append(_Need(directory, f"a version of {_gib(size)} in the registry", size))
    _compare(needs)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of what is written of all drafts together; `best` is how many checkpoints stay for being the best."""

    masters: int
    checkpoint: int
    export: int
    exports: int
    best: int

    @classmethod
    def of(cls, plan: RunPlan, drafts: Sequence[tuple[PlannedDraft, DraftConfig]]) -> _Sizes:
        training = plan.spec.training
        trained = [trained_bytes(draft.method, config, training.optimizer) for draft, config in drafts]
        exported = [draft.method.parameters(config) * _EXPORT_BYTES for draft, config in drafts]
        formats = [len(draft.method.formats) for draft, _ in drafts]
        return cls(
            masters=sum(draft.masters for draft in trained),
            checkpoint=sum(draft.checkpoint for draft in trained),
            export=sum(exported),
            exports=sum(count * size for count, size in zip(formats, exported, strict=True)),
            best=len(drafts) if training.heldout is not None else 0,
        )


@dataclass(frozen=True)
class _Need:
    """What is written to a `directory`, for people, and its bytes; all that lies in the run's `own` is part of it."""

    directory: Path
    what: str
    size: int
    own: bool = False


def _needs_of_run(plan: RunPlan, sizes: _Sizes) -> dict[str, int]:
    """Return what the run's directory holds at most: older checkpoints go once the one that is written is whole."""
    spec = plan.spec
    heldout = spec.training.heldout
    held_out = heldout.prompts * plan.max_sample_bytes if heldout is not None else 0
    count = spec.archive.keep + _WRITTEN + sizes.best
    said = f"archive.keep + {_WRITTEN}" + (f", and {sizes.best} for the best" if sizes.best else "")
    needs = {
        f"{count} checkpoints of {_gib(sizes.checkpoint)} ({said})": count * sizes.checkpoint,
        f"the untrained draft of {_gib(sizes.masters)}": sizes.masters,
        f"an export of {_gib(sizes.export)}": sizes.export,
        "logs and metrics": _BESIDES + held_out,
    }
    if spec.published:
        needs[f"exports in all formats of {_gib(sizes.exports)}"] = sizes.exports
    return needs


def _compare(needs: Sequence[_Need]) -> None:
    """Compare the `needs` of directories that may share a disk with what is free on each."""
    disks: dict[int, list[_Need]] = defaultdict(list)
    for need in needs:
        disks[existing(need.directory).stat().st_dev].append(need)
    for parts in disks.values():
        written = sum(_size(directory) for directory in {need.directory for need in parts if need.own})
        wanted = max(0, sum(need.size for need in parts) - written)
        place = parts[0].directory
        free = shutil.disk_usage(existing(place)).free
        if wanted > free:
            raise DiskTooSmall(
                f"{place}: expected {_gib(wanted)} free for {', '.join(need.what for need in parts)}, "
                f"found {_gib(free)}; make room, lower archive.keep, or move DRAFTLINE_HOME, archive.url or "
                "registry.url to a larger disk"
            )


def existing(path: Path) -> Path:
    """Return `path`, or the nearest directory above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def _size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _gib(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / 1024**2:.1f} MiB"
