"""How much sample memory fits this machine, and how much memory a client takes for transfers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

from disagg_core.errors import BadInput, StoreTooLarge
from disagg_core.processes.cgroups import GroupFiles, memory_groups

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

    The limits of the own cgroup of `process` and of every one above it count.
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


def _left_in_cgroups(process: Path) -> Iterator[int]:
    """Yield what each memory cgroup around the process described at `process` (``/proc/self``) still allows."""
    for group in memory_groups(process):
        for level in group.levels:
            yield from _left_in(level, group.files)


def _left_in(group: Path, files: GroupFiles) -> Iterator[int]:
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
