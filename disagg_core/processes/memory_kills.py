"""Has the kernel killed a process for memory? Read from the own memory cgroup, or from the machine's own count.

A kill counts for the cgroup of the process that it hits, whatever level's limit it was for (cgroups(7):
``memory.events`` of version 2, ``memory.oom_control`` of version 1). Children are in our group unless somebody moved
them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from disagg_core.processes.cgroups import MemoryGroup, memory_groups

RECENT_S = 120.0
"""A kill so long ago still explains a death: an agent ends its other processes before it ends itself."""

_PROC = Path("/proc")


def _kills(group: MemoryGroup) -> Path:
    return group.levels[0] / group.files.kills


class MemoryKills:
    """Counts kills for memory; `look` at least every few seconds, so that `recent` can tell new ones from old.

    `proc` is where the kernel shows its processes.
    """

    def __init__(self, proc: Path = _PROC, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._proc = proc
        self._clock = clock
        self._groups = [group for group in memory_groups(proc / "self") if _kills(group).is_file()]
        self._looks: deque[tuple[float, int]] = deque()
        self.look()

    def look(self) -> None:
        """Note the count of this moment; what is older than `RECENT_S` is forgotten, but for the last of it."""
        now = self._clock()
        self._looks.append((now, self._count()))
        while len(self._looks) > 1 and self._looks[1][0] <= now - RECENT_S:
            self._looks.popleft()

    def recent(self) -> str | None:
        """Return where processes were killed for memory since some two minutes ago, with the limit; None if nowhere."""
        kills = self._count() - self._looks[0][1]
        if kills <= 0:
            return None
        if not self._groups:
            return f"the kernel killed {kills} process(es) of this machine for memory"
        limit = min((limit for group in self._groups for limit in _limits(group)), default=None)
        allowed = "" if limit is None else f", whose limit is {limit} bytes ({limit / 2**30:.2f} GiB)"
        return f"the kernel killed {kills} process(es) for memory in {self._groups[0].levels[0]}{allowed}"

    def _count(self) -> int:
        if self._groups:
            return sum(_field(_kills(group)) for group in self._groups)
        return _field(self._proc / "vmstat")


def _field(path: Path) -> int:
    """Return the count ``oom_kill`` of a file of names and numbers; 0 where it has none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _limits(group: MemoryGroup) -> Iterator[int]:
    for level in group.levels:
        path = level / group.files.limits[0]
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdigit() and int(text) < 1 << 62:  # version 1 writes no limit as a very large one
            yield int(text)
