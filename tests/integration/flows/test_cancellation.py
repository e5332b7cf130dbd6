"""Cancelling flow runs on a real server: what has begun is ended by its worker, what has not is over at once."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from prefect import State, flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilterId
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Completed, Pending, Running, Scheduled

from flows.platform.deployments import TAG, _cancel_active_runs
from tasks.cancellation import cancel_unfinished
from tests.integration.flows.conftest import PrefectServer

pytestmark = pytest.mark.integration


@flow
def idle() -> None:
    """Never run: only its runs' states are looked at."""


async def runs_in(client: PrefectClient, *states: State[None]) -> list[UUID]:
    runs = [await client.create_flow_run(idle, state=Pending()) for _ in states]
    for run, state in zip(runs, states, strict=True):
        if not state.is_pending():
            await client.set_flow_run_state(run.id, state, force=True)
    return [run.id for run in runs]


async def types_of(client: PrefectClient, ids: list[UUID]) -> list[StateType]:
    states = [(await client.read_flow_run(run_id)).state for run_id in ids]
    return [state.type for state in states if state]


def test_what_has_begun_is_asked_and_what_has_not_is_over(api: PrefectServer) -> None:
    async def story() -> None:
        async with get_client() as client:
            ids = await runs_in(client, Scheduled(), Pending(), Running(), Completed())
            for _ in range(2):  # asking again changes nothing
                await cancel_unfinished(client, "the test is over", id=FlowRunFilterId(any_=ids))
                assert await types_of(client, ids) == [
                    StateType.CANCELLED,
                    StateType.CANCELLED,
                    StateType.CANCELLING,
                    StateType.COMPLETED,
                ]
            asked = (await client.read_flow_run(ids[2])).state
            assert asked is not None
            assert asked.message == "the test is over"

    asyncio.run(story())


def test_it_waits_for_the_end_of_those_that_it_cancelled(api: PrefectServer) -> None:
    async def story() -> None:
        async with get_client() as client:
            (running,) = await runs_in(client, Running())
            which = FlowRunFilterId(any_=[running])
            cancelling = asyncio.create_task(cancel_unfinished(client, "enough", wait_s=60, id=which))
            async with asyncio.timeout(60):
                while await types_of(client, [running]) != [StateType.CANCELLING]:
                    await asyncio.wait({cancelling}, timeout=0.05)
            assert not cancelling.done()
            await client.set_flow_run_state(running, Cancelled())  # its worker's word
            assert [run.id for run in await cancelling] == [running]

    asyncio.run(story())


def test_down_cancels_our_runs_and_nobody_else_s(api: PrefectServer) -> None:
    async def story() -> list[StateType]:
        async with get_client() as client:
            ours = await client.create_flow_run(idle, state=Scheduled(), tags=[TAG, "run:x"])
            theirs = await client.create_flow_run(idle, state=Scheduled(), tags=["theirs"])
            await _cancel_active_runs(30)
            types = await types_of(client, [ours.id, theirs.id])
            await client.set_flow_run_state(theirs.id, Cancelled())
            return types

    assert asyncio.run(story()) == [StateType.CANCELLED, StateType.SCHEDULED]
