"""How much sample memory fits this machine, and how much memory a client takes for transfers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from disagg_core.errors import BadInput, StoreTooLarge

HEADROOM = 0.05
"""Part of the available memory that is left to everything else."""

STAGING_BYTES = 64 << 20
"""The least transfer memory of one direction."""
_SAMPLES_STAGED = 4
_MOST_FOR_SEVERAL = 512 << 20
_PAGE = 4096
_HUGE_PAGE = 2 << 20


def staging_bytes_for(largest_sample: int) -> int:
    """Return the bytes of transfer memory of one direction for samples of up to `largest_sample` bytes.

    Four of the largest samples find room in it, or as many of them as fill 512 MiB, and in any case one.
    """
    sample = -(-largest_sample // _PAGE) * _PAGE
    samples = max(1, min(_SAMPLES_STAGED, _MOST_FOR_SEVERAL // sample))
    return max(STAGING_BYTES, -(-samples * sample // _HUGE_PAGE) * _HUGE_PAGE)


def most_regions(region_bytes: int) -> int:
    """Return how many regions of `region_bytes` one direction may have while transfers that were given up end.

    With one region in ordinary use; two at least, and more of small ones.
    """
    return max(2, min(4, 4 * STAGING_BYTES // region_bytes))


def available_bytes(process: Path = Path("/proc/self")) -> int:
    """Return the memory that may still be taken here: the machine's, or where that is less, what a cgroup allows.

    The limits of the own cgroup of `process` and of every one above it count: Slurm and systemd set them on the job's,
    the step's, the service's, a container runtime on the one that the container sees as the root.
    """
    available: int = psutil.virtual_memory().available
    return min([available, *(max(0, left) for left in _left_in_cgroups(process))])


def check_capacity(capacity: int) -> None:
    """Refuse a store that this machine cannot hold.

    Raises:
        BadInput: `capacity` is not above 0.
        StoreTooLarge: it does not fit; the message says what would.
    """
    if capacity <= 0:
        raise BadInput(f"store.capacity: expected a number of bytes above 0, found {capacity}")
    most = int(available_bytes() * (1 - HEADROOM))
    if capacity > most:
        raise StoreTooLarge(
            f"store.capacity: {capacity} bytes ({capacity / 2**30:.1f} GiB) were asked for, this machine has room for "
            f"{most} ({most / 2**30:.1f} GiB); set store.capacity to that or less, or spread the store over owners on "
            "other machines (store.mode: external)"
        )


class _Files(NamedTuple):
    """The names of one cgroup version: limits, what is used, and the page cache in it that nobody has in use."""

    limits: tuple[str, ...]
    used: str
    idle_cache: str


_V1 = _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files(("memory.max", "memory.high"), "memory.current", "inactive_file")


def _left_in_cgroups(process: Path) -> Iterator[int]:
    """Yield what each memory cgroup around the process described at `process` (``/proc/self``) still allows."""
    groups = _groups_of(process / "cgroup")
    for mount in _mounts_of(process / "mountinfo"):
        if mount.files in groups:
            path = os.path.relpath(groups[mount.files], mount.root)
            outside = path.startswith("..")  # the group is hidden from this mount, whose root is a container's
            folder = mount.point if outside else mount.point / path
            for level in (folder, *folder.parents):
                if level.is_relative_to(mount.point):
                    yield from _left_in(level, mount.files)


def _left_in(group: Path, files: _Files) -> Iterator[int]:
    used = group / files.used
    for limit in (group / name for name in files.limits):
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
            yield int(text) - int(used.read_text()) + _idle_cache(group / "memory.stat", files.idle_cache)


def _idle_cache(stat: Path, name: str) -> int:
    """Return the bytes of file cache that the kernel takes back first; they count as used, but are to be had."""
    for line in stat.read_text().splitlines() if stat.is_file() else ():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _groups_of(cgroup: Path) -> dict[_Files, str]:
    """Return the path of the process's memory cgroup for each version that it has one of."""
    groups = {}
    for line in cgroup.read_text().splitlines() if cgroup.is_file() else ():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            groups[_V2] = path
        elif "memory" in controllers.split(","):
            groups[_V1] = path
    return groups


class _Mount(NamedTuple):
    """A mounted hierarchy: which cgroup its root is, and where that is found."""

    files: _Files
    root: str
    point: Path


def _mounts_of(mountinfo: Path) -> Iterator[_Mount]:
    """Yield where hierarchies with memory limits are mounted, from ``/proc/<pid>/mountinfo`` (proc(5))."""
    for line in mountinfo.read_text().splitlines() if mountinfo.is_file() else ():
        mounted, _, kind = line.partition(" - ")
        root, point = mounted.split(" ")[3:5]
        filesystem, _, options = kind.split(" ")[:3]
        if filesystem == "cgroup2":
            yield _Mount(_V2, root, Path(point))
        elif filesystem == "cgroup" and "memory" in options.split(","):
            yield _Mount(_V1, root, Path(point))
