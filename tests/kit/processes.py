"""The live processes of this machine, and those that belong to a home."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil


def alive() -> Iterator[psutil.Process]:
    """Yield every process that runs, zombies aside."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                yield process


def environment_of(process: psutil.Process) -> dict[str, str]:
    """Return the environment that a process was started with; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.environ()
    return {}


def command_of(process: psutil.Process) -> str:
    """Return the command line of a process; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return " ".join(process.cmdline())
    return ""


def processes_of(home: Path) -> list[psutil.Process]:
    """Return every live process that was started in `home`."""
    return [process for process in alive() if environment_of(process).get("DRAFTLINE_HOME") == str(home)]
