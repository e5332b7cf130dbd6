"""The workers of a single machine: one process worker for each work pool, in one process, and a keeper over it.

Started by `flows.platform.local`. The keeper starts the process again when it dies: what its workers had started goes
on without them, and what waits for a worker is taken up by the next ones. On a cluster every pool has workers of its
own (``prefect worker start --pool ...``).
"""

from __future__ import annotations

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from disagg_core.processes.shutdown import PLATFORM_S
from disagg_core.processes.tree import describe_exit, spawn, stop_tree
from disagg_core.run_spec.document import PoolsSection

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_STOPS = (signal.SIGINT, signal.SIGTERM)
_LONG_S = 60.0
"""Who lived for so long did not die of its start."""

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


def keep(command: list[str], own_log: Path) -> None:
    """Run `command` until SIGINT or SIGTERM; start it again when it ends. Main thread only.

    What a process that died had started is left alone until the end, when all of it is ended.
    """
    stop = threading.Event()
    for number in _STOPS:
        signal.signal(number, lambda *_: stop.set())
    started: list[subprocess.Popen[bytes]] = []
    pauses = Pauses()
    while not stop.is_set():
        pauses.begin(time.monotonic())
        started.append(spawn(command, own_log, death_signal=signal.SIGKILL))
        while not stop.wait(0.2) and started[-1].poll() is None:
            continue
        if not stop.is_set():
            log.error("the workers died (%s) and are started again", describe_exit(started[-1].returncode))
            stop.wait(pauses.next(time.monotonic()))
    for process in reversed(started):
        stop_tree(process, grace_s=PLATFORM_S / 2 - 5, first=signal.SIGINT)


def main(arguments: list[str]) -> None:
    """``serve`` runs the workers; the path of a log instead keeps a process that does, with its output there."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if arguments[0] == "serve":
        asyncio.run(serve(PoolsSection()))
    else:
        keep([sys.executable, "-m", "flows.platform.workers", "serve"], Path(arguments[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
