"""How much sample memory fits this machine."""

from __future__ import annotations

from pathlib import Path

import psutil

from disagg_core.errors import BadInput, StoreTooLarge

HEADROOM = 0.05
"""Part of the available memory that is left to everything else."""

_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


def available_bytes() -> int:
    """Return the memory that may still be taken here: the machine's, or the container's where that is less."""
    available: int = psutil.virtual_memory().available
    for limit, used in _LIMITS:
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()).isdigit():
            available = min(available, max(0, int(text) - int(used.read_text())))
    return available


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
