"""Kills a rank in the middle of a save: all ranks are stopped before it is looked, so that what is seen is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.kit.waiting import eventually

_EVERY_S = 0.0005


@dataclass(frozen=True)
class KilledSave:
    """The save of `step` that was under way when `rank` was killed, and the `files` that there were of it."""

    step: int
    rank: int
    files: tuple[str, ...]


@dataclass(frozen=True)
class Saves:
    """The saves of an attempt's ranks, as seen from outside: what rank 0 writes beside a checkpoint's place."""

    checkpoints: Path
    processes: Sequence[ForkServerProcess]
    logs: Callable[[], str]

    def kill_in_one(self, rank: int, *, after: int, part: float) -> KilledSave:
        """SIGKILL `rank` when so large a `part` of a save is done, in the first that is met there after some others.

        How long a save takes is that of the one before; where the next one is over sooner, it is tried again.
        """
        for _ in range(after - 1):
            self._watched()
        while True:
            lasts_s = self._watched()
            place = self._begun()
            threading.Event().wait(part * lasts_s)
            with self._stopped():
                if place.exists():
                    self.processes[rank].kill()
                    files = tuple(sorted(str(file.relative_to(place)) for file in place.rglob("*")))
                    return KilledSave(int(place.name.split(".")[1].removeprefix("step-")), rank, files)

    def _watched(self) -> float:
        """Return how long the next save takes that begins."""
        place, began = self._begun(), time.monotonic()
        eventually(lambda: not place.exists(), self.logs, every_s=_EVERY_S, alive=self._live)
        return time.monotonic() - began

    def _begun(self) -> Path:
        """Wait for the next save to begin, or for one that has begun to go on; return where it is written."""
        pattern = f".step-*.{self.processes[0].pid}.tmp"  # what a rank that was killed has left bears another number
        return eventually(
            lambda: next(self.checkpoints.glob(pattern), None), self.logs, every_s=_EVERY_S, alive=self._live
        )

    def _live(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Stop all ranks, down to their last thread, for a while."""
        pids = [process.pid for process in self.processes if process.pid is not None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        eventually(lambda: all(_is_stopped(pid) for pid in pids), self.logs, every_s=_EVERY_S, alive=self._live)
        yield
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def _is_stopped(pid: int) -> bool:
    """Whether every thread of a process is stopped; one that waits for the disk is so a moment later."""
    states = [stat.read_text().rpartition(")")[2].split()[0] for stat in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(states) == {"T"}
