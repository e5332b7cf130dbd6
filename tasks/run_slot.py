"""One slot for "a run on these pools": a run has all that it needs, or waits and holds nothing.

Its two roles are flow runs of their own. Two runs on pools with one place each would otherwise take one place each, and
both wait for the other one until they are given up as stalled. The slots are Prefect's global concurrency limits, one
for each pool, taken together; where a pool has room for more runs, raise its limit in the UI or with ``prefect gcl``.

The slots are held on a lease, which is renewed for as long as the run's process lives, also over a server that is away
for minutes. Its id is a label of the flow run: whoever finds the process dead, the worker's hook, the next platform or
the next process of the same run, gives the slots back by it, and nobody waits for the lease to run out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import copy_context
from functools import partial
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as runtime

from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import PoolsSection
from tasks.pools import check_pools
from tasks.server_away import is_away, patiently

_LEASE_S = 300.0
"""How long the slots of a run whose process is gone stay taken where nobody gives them back, and how long a Prefect
server may be away."""
_RENEWAL_S = 30.0
_ASK_S = 3.0
_LABEL = "draftline.slot-lease"

_log = logging.getLogger(__name__)


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

    A run whose draft the gate has decided about needs no pool, and no slot: an approval waits for nobody's training.

    Raises:
        PoolsNotReady: it is this run's turn, and somebody else still holds the places on a pool, or its worker is gone.
    """
    if plan.dir.gate.is_file():
        yield
        return
    pools = plan.spec.orchestration.pools
    async with get_client() as client:
        await ensure_slots(client, pools)
        await release_slot(client, _this_flow_run())
        names = slot_names(pools)
        get_run_logger().info("waiting until no other run has %s", " and ".join(names))
        lease = await _acquired(client, names)
        ended = threading.Event()
        # In a thread: an upload of the archive keeps the event loop for longer than a lease.
        renew = partial(copy_context().run, _renew, lease, ended)
        threading.Thread(target=renew, name="draftline-slot", daemon=True).start()
        try:
            await asyncio.to_thread(check_pools, plan.spec, trained=plan.dir.completion.is_file())
            yield
        finally:
            ended.set()
            await patiently(lambda: client.release_concurrency_slots_with_lease(lease))


async def release_slot(client: PrefectClient, flow_run_id: UUID | None) -> None:
    """Give back what a process of this flow run, which is dead, has held; nothing if it held nothing."""
    if flow_run_id is None:
        return
    labels = (await patiently(lambda: client.read_flow_run(flow_run_id))).labels
    if lease := labels.get(_LABEL):
        await patiently(lambda: client.release_concurrency_slots_with_lease(UUID(str(lease))))


async def _acquired(client: PrefectClient, names: list[str]) -> UUID:
    """Wait until every limit of `names` has a slot free, take them, and return the lease."""
    flow_run_id = _this_flow_run()
    holder = ConcurrencyLeaseHolder(type="flow_run", id=flow_run_id) if flow_run_id else None
    while (lease := await _taken(client, names, holder)) is None:
        await asyncio.sleep(_ASK_S)
    if flow_run_id is not None:
        label: dict[str, str | int | float | bool] = {_LABEL: str(lease)}
        await patiently(lambda: client.update_flow_run_labels(flow_run_id, label))
    return lease


async def _taken(client: PrefectClient, names: list[str], holder: ConcurrencyLeaseHolder | None) -> UUID | None:
    """Take a slot of every limit of `names` and return the lease; None if one of them has none free."""
    try:
        answer = await patiently(
            lambda: client.increment_concurrency_slots_with_lease(
                names, 1, "concurrency", lease_duration=_LEASE_S, holder=holder
            )
        )
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.LOCKED:
            raise
        return None
    return UUID(answer.json()["lease_id"])


def _renew(lease: UUID, ended: threading.Event) -> None:
    """Renew `lease` until `ended`; a server that is away is asked again until it is back, or has given it up."""
    with get_client(sync_client=True) as client:
        while not ended.wait(_RENEWAL_S):
            try:
                client.renew_concurrency_lease(lease, _LEASE_S)
            except httpx.HTTPError as error:
                if not is_away(error):
                    _log.warning("the slots of this run are given up, another run may begin beside it: %s", error)
                    return
                _log.warning("the slots of this run cannot be renewed at present: %s", error)


def _this_flow_run() -> UUID | None:
    return UUID(str(runtime.id)) if runtime.id else None
