"""A recurring training is a schedule on a deployment: the server must turn it into runs by itself."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from uuid import UUID

import pytest
from prefect import State, get_client
from prefect.flow_runs import resume_flow_run
from prefect.states import Completed, Pending, Running, Suspended

from disagg_core.run_spec.yaml_file import load_spec
from flows.platform.deployments import Nightly, register
from tests.integration.flows.conftest import PrefectServer, running, served, server_in, spoken_to
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

NIGHTLY = Path(__file__).resolve().parents[3] / "infra" / "runs" / "nightly.yaml"
GREETING = Path(__file__).with_name("greeting.py")


def test_a_schedule_starts_a_run(prefect_server: PrefectServer, tmp_path: Path) -> None:
    def scheduled_and_done() -> list[dict[str, object]]:
        runs = prefect_server.find("flow_runs", flows={"name": {"any_": ["greeting"]}})
        return [run for run in runs if run["auto_scheduled"] and run["state_type"] == "COMPLETED"]

    environment = {**prefect_server.environment, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with running([sys.executable, str(GREETING), "every 3 s"], environment, tmp_path / "greeting.log"):
        eventually(scheduled_and_done, every_s=0.2)
    created_by = scheduled_and_done()[0]["created_by"]
    assert isinstance(created_by, dict)
    assert created_by["type"] == "SCHEDULE"


@pytest.mark.slow
def test_a_night_waits_for_the_one_before_and_both_outlast_the_death_of_the_server(tmp_path: Path) -> None:
    """The clock strikes every minute; this test does what a worker does with the runs that it makes."""
    server = server_in(tmp_path)
    with spoken_to(server):
        with served(server) as process:
            register(Nightly(load_spec(NIGHTLY), "* * * * *"))
            eventually(lambda: len(nights(server)) >= 2, every_s=0.5)
            first, second = nights(server)[:2]
            begin(first)
            keep_slot(first)
            assert ask(second, Pending()).name == "AwaitingConcurrencySlot"
            known = set(nights(server))
            process.kill()

        with served(server):
            assert ask(second, Pending()).name == "AwaitingConcurrencySlot"
            eventually(lambda: set(nights(server)) > known, within_s=180, every_s=0.5)
            assert ask(first, Completed(name="Promoted")).name == "Promoted"
            assert ask(second, Pending()).name == "Pending"


@pytest.mark.slow
def test_a_night_that_is_answered_while_another_one_runs_goes_on_after_it(api: PrefectServer) -> None:
    """One that waits for a person holds no slot of its deployment, and needs one again; this test is the worker."""
    register()

    async def create() -> list[UUID]:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name("online-disagg-training/nightly")
            return [(await client.create_flow_run_from_deployment(deployment.id)).id for _ in range(2)]

    asks, runs = asyncio.run(create())
    begin(asks)
    assert ask(runs, Pending()).name == "AwaitingConcurrencySlot"
    assert ask(asks, Suspended(timeout_seconds=3600, pause_key="approval")).name == "Suspended"
    begin(runs)
    keep_slot(runs)

    resume_flow_run(asks)
    assert ask(asks, Pending()).name == "AwaitingConcurrencySlot"
    assert ask(runs, Completed(name="Promoted")).name == "Promoted"
    begin(asks)


def nights(server: PrefectServer) -> list[UUID]:
    """Return the runs that the clock has made so far, the earliest first."""
    runs = server.find("flow_runs", deployments={"name": {"any_": ["nightly"]}}, sort="EXPECTED_START_TIME_ASC")
    return [UUID(str(run["id"])) for run in runs if run["auto_scheduled"]]


def begin(flow_run_id: UUID) -> None:
    """Take the slot of a run's deployment and begin the run, as soon as it is due."""
    assert ask(flow_run_id, Pending()).name == "Pending"
    eventually(lambda: ask(flow_run_id, Running()).name == "Running", every_s=1.0)


def keep_slot(flow_run_id: UUID) -> None:
    """Renew the slot of a run, as its process does, for longer than this test takes."""

    async def renew() -> None:
        async with get_client() as client:
            state = (await client.read_flow_run(flow_run_id)).state
            assert state is not None
            lease = state.state_details.deployment_concurrency_lease_id
            assert lease is not None
            await client.renew_concurrency_lease(lease, 3600)

    asyncio.run(renew())


def ask(flow_run_id: UUID, state: State[None]) -> State[None]:
    """Propose a state for a run, as its worker and its process do; return the one that the server gives it."""

    async def propose() -> State[None]:
        async with get_client() as client:
            return (await client.set_flow_run_state(flow_run_id, state)).state  # type: ignore[return-value]

    return asyncio.run(propose())
