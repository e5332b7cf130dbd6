"""The workers of a single machine: one process worker for each work pool, in one process, and a keeper over it.

Started by `flows.platform.local`. The keeper starts the process again when it dies: what its workers had started goes
on without them, and what waits for a worker is taken up by the next ones. On a cluster every pool has workers of its
own (``prefect worker start --pool ...``).
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from disagg_core.processes.shutdown import PLATFORM_S
from disagg_core.processes.tree import descendants, describe_exit, spawn, stop_tree
from disagg_core.run_spec.document import PoolsSection

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_STOPS = (signal.SIGINT, signal.SIGTERM)
_LONG_S = 60.0
"""Who lived for so long did not die of its start."""
_LOOK_S = 5.0
"""How often the keeper looks whether something is left of workers that died."""

log = logging.getLogger(__name__)


def worker_name(pool: str) -> str:
    """Return the name of this machine's worker of `pool`."""
    return f"local-{pool}"


async def serve(pools: PoolsSection) -> None:
    """Run a process worker for each pool until SIGINT or SIGTERM; one that ends with an error is started again."""
    stop = asyncio.Event()
    for number in _STOPS:
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    workers = [asyncio.create_task(_work(pool)) for pool in (pools.orchestrator, pools.rollout, pools.train)]
    await stop.wait()
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)


async def _work(pool: str) -> None:
    """Run workers of `pool`, one after the other, until this is cancelled."""
    from prefect.workers.process import ProcessWorker

    pauses = Pauses()
    while True:
        pauses.begin(time.monotonic())
        try:
            await ProcessWorker(work_pool_name=pool, name=worker_name(pool)).start()
            log.error("the worker of %s ended by itself, and is started again", pool)
        except Exception:
            log.exception("the worker of %s failed, and is started again", pool)
        await asyncio.sleep(pauses.next(time.monotonic()))


class Pauses:
    """Pauses before the next start, which double where each start is followed by a death."""

    def __init__(self) -> None:
        self._began = 0.0
        self._pause_s = _FIRST_PAUSE_S

    def begin(self, now: float) -> None:
        """Take note of a start."""
        self._began = now

    def next(self, now: float) -> float:
        """Return the seconds to wait after a death."""
        if now - self._began > _LONG_S:
            self._pause_s = _FIRST_PAUSE_S
        pause = self._pause_s
        self._pause_s = min(2 * pause, _LONGEST_PAUSE_S)
        return pause


@dataclass(frozen=True)
class _Workers:
    """A process of workers, and the directory of its temporary files, which nobody removes for one that is killed."""

    process: subprocess.Popen[bytes]
    temporary: Path

    @classmethod
    def start(cls, command: list[str], own_log: Path) -> _Workers:
        temporary = Path(tempfile.mkdtemp(prefix="draftline-workers-"))
        return cls(spawn([*command, str(temporary)], own_log, death_signal=signal.SIGKILL), temporary)

    def has_ended(self) -> bool:
        """Whether it has ended with all that it started; what those read is then removed."""
        if self.process.poll() is None or descendants(self.process):
            return False
        shutil.rmtree(self.temporary, ignore_errors=True)
        return True

    def stop(self) -> None:
        """End it, and all that it started."""
        stop_tree(self.process, grace_s=PLATFORM_S / 2 - 5, first=signal.SIGINT)
        shutil.rmtree(self.temporary, ignore_errors=True)


def keep(command: list[str], own_log: Path) -> None:
    """Run `command` until SIGINT or SIGTERM; start it again when it ends. Main thread only.

    Its last argument is a directory for its temporary files. What a process that died had started is left alone until
    the end, when all of it is ended; its files go when it has ended.
    """
    stop = threading.Event()
    for number in _STOPS:
        signal.signal(number, lambda *_: stop.set())
    started: list[_Workers] = []
    pauses, looked = Pauses(), time.monotonic()
    while not stop.is_set():
        pauses.begin(time.monotonic())
        started.append(_Workers.start(command, own_log))
        while not stop.wait(0.2) and started[-1].process.poll() is None:
            if len(started) > 1 and time.monotonic() - looked >= _LOOK_S:
                started = [workers for workers in started if not workers.has_ended()]
                looked = time.monotonic()
        if not stop.is_set():
            log.error("the workers died (%s) and are started again", describe_exit(started[-1].process.returncode))
            stop.wait(pauses.next(time.monotonic()))
    for workers in reversed(started):
        workers.stop()


def main(arguments: list[str]) -> None:
    """``serve DIRECTORY`` runs the workers with their temporary files there; the path of a log instead keeps a process
    that does, with its output there.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if arguments[0] == "serve":
        tempfile.tempdir = arguments[1]  # of this process alone: what it starts has the machine's own
        asyncio.run(serve(PoolsSection()))
    else:
        keep([sys.executable, "-m", "flows.platform.workers", "serve"], Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
