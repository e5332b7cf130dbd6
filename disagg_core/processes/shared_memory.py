"""Shared memory that servers of the target leave behind when they are killed: found while they live, freed afterwards.

A file in ``/dev/shm`` outlives the processes that map it. SGLang's, and the semaphores of Python's multiprocessing,
have names of their own for each start; nothing else is touched, as a target's weights may lie there too.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import psutil

from disagg_core.processes.tree import descendants

_MAPPED = re.compile(r"(/dev/shm/(?:sglang_loads_|sgl_shm_|sem\.mp-)\S+)")


def shared_memory_of(process: subprocess.Popen[bytes]) -> set[Path]:
    """Return the files of that kind that `process`, which `spawn` started, and its descendants have mapped."""
    found: set[Path] = set()
    for pid in {process.pid, *(child.pid for child in descendants(process))}:
        with contextlib.suppress(OSError, psutil.Error):
            found |= {Path(name) for name in _MAPPED.findall(Path(f"/proc/{pid}/maps").read_text())}
    return found


class SharedMemory:
    """The shared memory of one server, also noted in the file `notes` for the case that we are killed with it."""

    def __init__(self, notes: Path) -> None:
        self._notes = notes

    def note(self, process: subprocess.Popen[bytes]) -> None:
        """Take note of what the server has now; it replaces what was noted of an earlier one."""
        if found := shared_memory_of(process):
            self._notes.write_text("".join(f"{path}\n" for path in sorted(found)))

    def free(self) -> None:
        """Free what was noted. Only once all processes of the server have ended."""
        if self._notes.is_file():
            for name in _MAPPED.findall(self._notes.read_text()):
                Path(name).unlink(missing_ok=True)
            self._notes.unlink()
