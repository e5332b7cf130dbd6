"""Why a role's process ended when it could not say so itself: by its exit, its agent's log, and the kernel's counts."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from disagg_core.failures import POLICIES, FailureClass
from disagg_core.processes.memory_kills import MemoryKills
from disagg_core.processes.tree import describe_exit

_OWN_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGABRT,
    signal.SIGSYS,
    signal.SIGTRAP,
}
"""Signals that a process gets for what it does itself; all others come from outside."""

_READ_BYTES = 256 * 1024
_RANK_EXIT = re.compile(rb"(?:failed \(exitcode|Root Cause.*?exitcode)\s*: (-?\d+)", re.DOTALL)
"""How torchrun's agent names the exit of the rank that failed first."""


def cause_of_death(code: int, log: Path, *, since: int, memory: MemoryKills) -> tuple[FailureClass, str]:
    """Return class and description of an end with exit code `code` (below 0: the signal) that left no outcome.

    `log` is the process's output, of which what stands from byte `since` on is its own.
    """
    ended = code
    if code > 0 and (rank := _rank_exit(log, since)) is not None:
        ended = rank
    described = describe_exit(ended) if ended == code else f"{describe_exit(code)}, a rank {describe_exit(ended)}"
    if ended >= 0:
        return "bug", described
    if ended == -signal.SIGKILL and (killed := memory.recent()) is not None:
        return "out_of_memory", f"{described}: {killed}. {POLICIES['out_of_memory'].way_out}"
    return ("bug" if -ended in _OWN_FAULTS else "preempted"), described


def _rank_exit(log: Path, since: int) -> int | None:
    """Return the exit code of the rank that failed first, as the agent wrote it into `log`; None if it did not."""
    if not log.is_file():
        return None
    with log.open("rb") as file:
        file.seek(max(since, log.stat().st_size - _READ_BYTES))
        found = _RANK_EXIT.search(file.read())
    return int(found[1]) if found else None
