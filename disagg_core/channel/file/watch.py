"""Waking up when a channel's directory changes: inotify on local mounts, adaptive polling elsewhere.

inotify only reports what happens on this machine, so on a network mount (and on any file system not known to be
local) the directory is looked at instead, after 1 ms, 2 ms, 4 ms ... and at last every 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_LOCAL = frozenset({"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"})
_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE = 0x2, 0x80, 0x100
_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.020
_LOOK_AGAIN_S = 1.0
"""With inotify, how often to look all the same: no lost event may cost more than this."""


def is_local_mount(path: Path) -> bool:
    """Return whether `path` (or what exists of it) lies on a file system that only this machine changes."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        mount = fields[4].encode().decode("unicode_escape")
        if existing.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, fields[fields.index("-") + 1]
    return kind in _LOCAL


class DirectoryWatch:
    """Waits for a condition that can only change when something in a directory changes."""

    def __init__(self, directory: Path, *, local: bool) -> None:
        self._inotify: int | None = None
        if local and directory.is_dir():
            self._inotify = _watch(directory)
        self._events = select.poll()
        if self._inotify is not None:
            self._events.register(self._inotify, select.POLLIN)

    def __enter__(self) -> DirectoryWatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        """Return True as soon as `ready()`, False after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        pause = _FIRST_PAUSE_S
        while not ready():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._inotify is None:
                time.sleep(min(pause, left))
                pause = min(pause * 2, _LONGEST_PAUSE_S)
                continue
            if self._events.poll(min(left, _LOOK_AGAIN_S) * 1000):
                os.read(self._inotify, 64 * 1024)
        return True

    def close(self) -> None:
        """Stop watching."""
        if self._inotify is not None:
            os.close(self._inotify)
            self._inotify = None


def _watch(directory: Path) -> int | None:
    """Return an inotify descriptor for a directory; None when the machine has none to give."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        return None
    if libc.inotify_add_watch(descriptor, os.fsencode(directory), _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE) < 0:
        os.close(descriptor)
        return None
    return descriptor
