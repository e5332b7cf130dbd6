"""The memory cgroups around a process, of either version, read from what the kernel shows of it (cgroups(7), proc(5)).

Slurm and systemd set limits on the job's, the step's, the service's group, a container runtime on the one that the
container sees as the root.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class GroupFiles(NamedTuple):
    """The names that one version has for a group's files, and for its page cache that nobody has in use.

    The first of `limits` is the hard one, at which the kernel kills; `kills` has a line ``oom_kill``.
    """

    limits: tuple[str, ...]
    used: str
    idle_cache: str
    kills: str


_V1 = GroupFiles(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file", "memory.oom_control"
)  # fmt: skip
_V2 = GroupFiles(("memory.max", "memory.high"), "memory.current", "inactive_file", "memory.events")


@dataclass(frozen=True)
class MemoryGroup:
    """One memory cgroup of a process: its own folder first, then those above it, as far as they can be seen."""

    files: GroupFiles
    levels: tuple[Path, ...]


def memory_groups(process: Path = Path("/proc/self")) -> Iterator[MemoryGroup]:
    """Yield the memory cgroups of the process described at `process`."""
    paths = _paths_of(process / "cgroup")
    for mount in _mounts_of(process / "mountinfo"):
        if mount.files in paths:
            inside = os.path.relpath(paths[mount.files], mount.root)
            hidden = inside.startswith("..")  # from a container, whose own group is the mount's root
            folder = mount.point if hidden else mount.point / inside
            levels = (level for level in (folder, *folder.parents) if level.is_relative_to(mount.point))
            yield MemoryGroup(mount.files, tuple(levels))


def _paths_of(cgroup: Path) -> dict[GroupFiles, str]:
    """Return the path of the process's memory cgroup for each version that it has one of."""
    paths = {}
    for line in cgroup.read_text().splitlines() if cgroup.is_file() else ():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" and not controllers:
            paths[_V2] = path
        elif "memory" in controllers.split(","):
            paths[_V1] = path
    return paths


class _Mount(NamedTuple):
    """A mounted hierarchy: which cgroup its root is, and where that is found."""

    files: GroupFiles
    root: str
    point: Path


def _mounts_of(mountinfo: Path) -> Iterator[_Mount]:
    """Yield where hierarchies with memory limits are mounted, from ``/proc/<pid>/mountinfo``."""
    for line in mountinfo.read_text().splitlines() if mountinfo.is_file() else ():
        mounted, _, kind = line.partition(" - ")
        root, point = mounted.split(" ")[3:5]
        filesystem, _, options = kind.split(" ")[:3]
        if filesystem == "cgroup2":
            yield _Mount(_V2, root, Path(point))
        elif filesystem == "cgroup" and "memory" in options.split(","):
            yield _Mount(_V1, root, Path(point))
