"""What a process takes in: while a model is loaded, nothing else shows whether it gets on or hangs at a mount."""

from __future__ import annotations

import mmap
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import psutil

STEP_BYTES = 32 << 20
"""Heartbeats and logs read and write as well; a load that hangs takes in less than this in hours."""

_EVERY_S = 1.0


def bytes_taken() -> int:
    """Return the bytes that this process has read, written and brought into its memory so far; it never shrinks.

    Weights are mapped, not read: what counts of them is every page that came in.
    """
    usage, files = resource.getrusage(resource.RUSAGE_SELF), psutil.Process().io_counters()
    pages = usage.ru_minflt + usage.ru_majflt
    return int(files.read_chars + files.write_chars) + pages * mmap.PAGESIZE


class Notes(Protocol):
    """Something that looks, now and then, whether work got on."""

    def look(self) -> None:
        """Note what is new."""


class IntakeNotes:
    """Calls `note` when the process has taken in another `STEP_BYTES` since the last note. Pure but for `taken`."""

    def __init__(self, what: str, note: Callable[[str], object], *, taken: Callable[[], int] = bytes_taken) -> None:
        self._what = what
        self._note = note
        self._taken = taken
        self._began = self._noted = taken()

    def look(self) -> None:
        """Note what is new."""
        found = self._taken()
        if found - self._noted >= STEP_BYTES:
            self._noted = found
            self._note(f"{self._what}: {(found - self._began) / 2**30:.2f} GiB taken in")


@contextmanager
def noted(notes: Notes, every_s: float = _EVERY_S) -> Iterator[None]:
    """Look every `every_s` seconds, in a thread of its own, while the context is open."""
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(every_s):
            notes.look()

    thread = threading.Thread(target=watch, name="draftline-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()
