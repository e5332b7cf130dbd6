"""The workers of a single machine: one process worker for each work pool, in one process.

Started by `flows.platform.local`. On a cluster every pool has workers of its own (``prefect worker start --pool ...``).
"""

from __future__ import annotations

import asyncio
import signal

from prefect.workers.process import ProcessWorker

from disagg_core.run_spec.document import PoolsSection


def worker_name(pool: str) -> str:
    """Return the name of this machine's worker of `pool`."""
    return f"local-{pool}"


async def serve(pools: PoolsSection) -> None:
    """Run a process worker for each pool until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    workers = [
        asyncio.create_task(ProcessWorker(work_pool_name=pool, name=worker_name(pool)).start())
        for pool in (pools.orchestrator, pools.rollout, pools.train)
    ]
    stopped = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([*workers, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(serve(PoolsSection()))
