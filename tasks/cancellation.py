"""Cancelling flow runs, in the one way there is.

A run that has begun becomes `Cancelling`: the worker that holds its process ends it and then says `Cancelled`. One that
has not begun is `Cancelled` at once. Its process may be on its way all the same, and the server lets a run that is over
begin: what is to end with its run asks for that itself (`abort_if_over`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect import State, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.exceptions import Abort
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as runtime
from prefect.states import Cancelled, Cancelling

_POLL_S = 0.5


async def request_cancellation(client: PrefectClient, run: FlowRun, reason: str) -> None:
    """Ask for the end of `run`, which the server tells with `reason`; nothing if it has ended, or was asked before."""
    if run.state and (run.state.is_final() or run.state.type is StateType.CANCELLING):
        return
    if run.start_time is not None:
        await client.set_flow_run_state(run.id, Cancelling(message=reason))
        return
    await client.set_flow_run_state(run.id, Cancelled(message=reason))
    since = _since_scheduled(await client.read_flow_run_states(run.id))
    if any(state.is_running() for state in since) and since[-1].is_cancelled():
        # It has begun since it was read: only its worker can end its process.
        await client.set_flow_run_state(run.id, Cancelling(message=reason), force=True)


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


def abort_if_over() -> None:
    """Return if the flow run that this process works for is to go on; a server that is away tells nothing.

    Raises:
        Abort: somebody has ended it, or taken it for dead, meanwhile; Prefect lets this process end without a word.
    """
    if not runtime.id:
        return
    flow_run_id = UUID(str(runtime.id))
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run_id)
        end = _end_among(_since_scheduled(states))
        if end is None:
            return
        if not states[-1].is_final():
            client.set_flow_run_state(flow_run_id, Cancelled(message=end.message), force=True)
        get_run_logger().warning("this flow run was ended meanwhile (%s: %s): its process ends", end.name, end.message)
        raise Abort(f"the flow run was ended meanwhile: {end.name}")


def _since_scheduled(states: Sequence[State[Any]]) -> list[State[Any]]:
    """Return, of a run's `states` in their order, those of its last try: what came after it was scheduled."""
    since: list[State[Any]] = []
    for state in states:
        since = [] if state.is_scheduled() else [*since, state]
    return since


def _end_among(states: Sequence[State[Any]]) -> State[Any] | None:
    """Return what ended a try of these `states`, None if nothing has; one that is cancelling is left to its worker."""
    ends = (state for state in states if state.is_final() or (state.is_cancelling() and state is not states[-1]))
    return next(ends, None)
