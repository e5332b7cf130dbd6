"""Cancelling flow runs on a real server: what has begun is ended by its worker, what has not is over at once."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect import State, flow, get_client
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilterId
from prefect.client.schemas.objects import StateType
from prefect.exceptions import Abort
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Pending, Running, Scheduled

from flows.platform.deployments import TAG, _cancel_active_runs
from tasks import cancellation, role_process
from tasks.cancellation import abort_if_over, cancel_unfinished, request_cancellation
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


def test_a_run_that_begins_while_it_is_cancelled_is_ended_by_its_worker(api: PrefectServer) -> None:
    async def story() -> list[StateType]:
        async with get_client() as client:
            (starting,) = await runs_in(client, Pending())
            as_it_was = await client.read_flow_run(starting)
            await client.set_flow_run_state(starting, Running())
            await request_cancellation(client, as_it_was, "the parent is cancelled")
            return await types_of(client, [starting])

    assert asyncio.run(story()) == [StateType.CANCELLING]


def run_of_this_process(monkeypatch: pytest.MonkeyPatch, *states: State[None]) -> UUID:
    """Let this process work for a flow run that went through these states."""
    with get_client(sync_client=True) as client:
        run_id = client.create_flow_run(idle, state=Pending()).id
        for state in states:
            client.set_flow_run_state(run_id, state, force=True)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run_id))
    monkeypatch.setattr(cancellation, "get_run_logger", lambda: logging.getLogger("test"))
    return run_id


@pytest.mark.parametrize(
    "states",
    [(Cancelled(), Running()), (Cancelling(), Running()), (Running(), Cancelled()), (Running(), Crashed())],
    ids=["cancelled before it began", "asked before it began", "cancelled", "taken for dead"],
)
def test_a_process_whose_run_is_over_ends(
    api: PrefectServer, monkeypatch: pytest.MonkeyPatch, states: tuple[State[None], ...]
) -> None:
    run_id = run_of_this_process(monkeypatch, *states)
    with pytest.raises(Abort):
        abort_if_over()
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    assert state is not None
    assert state.is_final()


@pytest.mark.parametrize(
    "states",
    [(Running(),), (Running(), Cancelled(), AwaitingRetry(), Running()), (Running(), Cancelling())],
    ids=["running", "tried again", "its worker is about to end it"],
)
def test_a_process_whose_run_goes_on_does_not_end(
    api: PrefectServer, monkeypatch: pytest.MonkeyPatch, states: tuple[State[None], ...]
) -> None:
    run_of_this_process(monkeypatch, *states)
    abort_if_over()


def test_the_tree_of_a_role_ends_with_a_run_that_is_ended_on_the_server(
    api: PrefectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing but its watcher is there to end it."""
    run_id = run_of_this_process(monkeypatch, Running())
    monkeypatch.setattr(role_process, "_LOOK_S", 0.0)
    told = tmp_path / "pid"

    def cancel_once_it_runs() -> None:
        if told.is_file():
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(run_id, Cancelled())

    role = f"import os, pathlib, signal; pathlib.Path({str(told)!r}).write_text(str(os.getpid())); signal.pause()"
    with pytest.raises(Abort):
        role_process._run_tree([sys.executable, "-c", role], tmp_path / "log", {}, cancel_once_it_runs)
    assert not psutil.pid_exists(int(told.read_text()))
