"""Flow runs that the parent starts on other pools: dispatched, watched to their end, cancelled when they must stop.

A child that ends badly raises nothing here; whoever dispatched it looks at the state it ended in.
"""

from __future__ import annotations

import asyncio
import contextlib
import pkgutil
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from uuid import UUID, uuid4

from prefect import State, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled

from disagg_core.errors import FailureClass
from disagg_core.processes.shutdown import CANCELLATION_S, CHILDREN_S
from disagg_core.run_spec.document import PoolsSection
from tasks.cancellation import request_cancellation
from tasks.server_away import patiently as _patiently

_REGISTER = "flows.platform.deployments:register_all"  # flows are above tasks: asked for by name, as they start us
_POLL_S = 1.0


class Supervision:
    """What the two watchers of an attempt tell each other: the order to stop, and why."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.reason = ""
        self.failure_class: FailureClass | None = None

    def request_stop(self, reason: str, failure_class: FailureClass | None = None) -> None:
        """Ask both watchers to cancel their role; the first reason counts.

        `failure_class` is given where the attempt's failure is the watchers' own finding and no role's.
        """
        if not self.stop.is_set():
            self.reason, self.failure_class = reason, failure_class
            self.stop.set()


async def run_child(
    flow_name: str,
    pool: str,
    parameters: Mapping[str, object],
    *,
    name: str,
    tags: Sequence[str],
    start_timeout_s: float | None,
    supervision: Supervision,
) -> FlowRun:
    """Run the deployment of `flow_name` on `pool` as a child called `name` of this run; return it as it ended.

    It is cancelled when `supervision` says stop, or when no worker takes it within `start_timeout_s` seconds (None: it
    waits for its turn however long that takes). Where
    this run is cancelled itself, the child has time to save its state before what it lives on is torn down.
    """
    async with get_client() as client:
        await _require_deployment(client, f"{flow_name}/{pool}", pool)
        asked = str(uuid4())  # an order whose answer was lost is the same order when it is sent again
        started = await _patiently(
            lambda: arun_deployment(
                f"{flow_name}/{pool}",
                parameters=dict(parameters),
                flow_run_name=name,
                timeout=0,
                as_subflow=True,
                tags=list(tags),
                idempotency_key=asked,
            )
        )
        try:
            return await _watch(client, started.id, pool, supervision, start_timeout_s)
        except asyncio.CancelledError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHILDREN_S):
                    await _cancel(client, started.id, "the run was cancelled")
            raise


def state_name(flow_run: FlowRun) -> str:
    """Return the type of the state a flow run is in: Completed, Failed, Cancelled, Crashed, ..."""
    return flow_run.state.type.value.capitalize() if flow_run.state else "Unknown"


async def _watch(
    client: PrefectClient, run_id: UUID, pool: str, supervision: Supervision, start_timeout_s: float | None
) -> FlowRun:
    """Follow a flow run to its end; cancel it when the attempt is to stop, or when no worker takes it in time."""
    waited = 0.0
    while True:
        flow_run = await _read(client, run_id)
        if flow_run.state and flow_run.state.is_final():
            return flow_run
        if supervision.stop.is_set():
            return await _cancel(client, run_id, supervision.reason)
        if start_timeout_s is not None and flow_run.start_time is None and waited > start_timeout_s:
            supervision.request_stop(
                f"no worker of pool {pool} started its run in {start_timeout_s:.0f} s "
                "(orchestration.stall_timeout_s); start one: prefect worker start --pool " + pool,
                "stalled",
            )
            continue
        await asyncio.sleep(_POLL_S)
        waited += _POLL_S


async def _cancel(client: PrefectClient, run_id: UUID, reason: str) -> FlowRun:
    """Cancel a flow run and wait, bounded, until it has ended."""
    flow_run = await _read(client, run_id)
    for waited in range(int(CANCELLATION_S / _POLL_S)):
        if flow_run.state and flow_run.state.is_final():
            return flow_run
        if waited == 0:
            await _patiently(partial(request_cancellation, client, flow_run, reason))
        await asyncio.sleep(_POLL_S)
        flow_run = await _read(client, run_id)
    late: State[object] = Cancelled(message=f"{reason}; did not end in {CANCELLATION_S:.0f} s")
    await _patiently(lambda: client.set_flow_run_state(run_id, late, force=True))
    return await _read(client, run_id)


async def _read(client: PrefectClient, run_id: UUID) -> FlowRun:
    return await _patiently(lambda: client.read_flow_run(run_id))


async def _require_deployment(client: PrefectClient, name: str, pool: str) -> None:
    """Register the deployments again if `name` is gone or has lost its pool, as when one was deleted in the UI."""
    with contextlib.suppress(ObjectNotFound):
        deployment = await _patiently(lambda: client.read_deployment_by_name(name))
        if deployment.work_pool_name is not None:
            return
    get_run_logger().warning("deployment %s, or pool %s, was deleted: they are registered again", name, pool)
    register: Callable[[PoolsSection], Awaitable[None]] = pkgutil.resolve_name(_REGISTER)
    await register(PoolsSection())
