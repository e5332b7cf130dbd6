"""Cancelling flow runs, in the one way there is.

A run that has begun becomes `Cancelling`: the worker that holds its process ends it and then says `Cancelled`. One that
has not begun has no process, and is `Cancelled` at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.states import Cancelled, Cancelling

_POLL_S = 0.5


async def request_cancellation(client: PrefectClient, run: FlowRun, reason: str) -> None:
    """Ask for the end of `run`, which the server tells with `reason`; nothing if it has ended, or was asked before."""
    if run.state and (run.state.is_final() or run.state.type is StateType.CANCELLING):
        return
    begun = run.start_time is not None
    await client.set_flow_run_state(run.id, Cancelling(message=reason) if begun else Cancelled(message=reason))


async def cancel_unfinished(client: PrefectClient, reason: str, *, wait_s: float = 0.0, **among: Any) -> list[FlowRun]:
    """Cancel the unfinished runs `among` these fields of a `FlowRunFilter`, by default all, and return them.

    Waits up to `wait_s` seconds for their end.

    Raises:
        httpx.HTTPError: the server does not answer.
    """
    unfinished = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(not_any_=list(TERMINAL_STATES))), **among
    )
    runs = await client.read_flow_runs(flow_run_filter=unfinished)
    for run in runs:
        await request_cancellation(client, run, reason)
    if wait_s:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while await client.read_flow_runs(flow_run_filter=unfinished, limit=1):
                    await asyncio.sleep(_POLL_S)
    return runs
