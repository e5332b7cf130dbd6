"""One slot for "a run on these pools": a run has all that it needs, or waits and holds nothing.

Its two roles are flow runs of their own. Two runs on pools with one place each would otherwise take one place each, and
both wait for the other one until they are given up as stalled. The slots are Prefect's global concurrency limits, one
for each pool, taken together; where a pool has room for more runs, raise its limit in the UI or with ``prefect gcl``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger

from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import PoolsSection
from tasks.pools import check_pools

_LEASE_S = 300.0
"""How long the slots of a run whose process is gone stay taken, and how long a Prefect server may be away."""


def slot_names(pools: PoolsSection) -> list[str]:
    """Return the limits of which a run takes one slot each, always in the same order."""
    return [f"draftline: runs on {pool}" for pool in sorted({pools.rollout, pools.train})]


async def ensure_slots(client: PrefectClient, pools: PoolsSection) -> None:
    """Create the limits that are not there, with one slot; one that somebody has changed stays as it is."""
    for name in slot_names(pools):
        try:
            await client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):
                await client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))


@asynccontextmanager
async def run_slot(plan: RunPlan) -> AsyncIterator[None]:
    """Hold a slot on both pools of the run, from before its roles until its evaluation has ended; waits without end.

    Raises:
        PoolsNotReady: it is this run's turn, and somebody else still holds the places on a pool, or its worker is gone.
    """
    pools = plan.spec.orchestration.pools
    async with get_client() as client:
        await ensure_slots(client, pools)
    names = slot_names(pools)
    get_run_logger().info("waiting until no other run has %s", " and ".join(names))
    async with concurrency(names, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False):
        await asyncio.to_thread(check_pools, plan.spec, trained=plan.dir.completion.is_file())
        yield
