"""Two runs on the same pools take turns as wholes, on a real Prefect server."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate
from prefect.states import Pending

from disagg_core.run_spec.document import PoolsSection
from tasks import run_slot as module
from tasks.run_slot import ensure_slots, release_slot, run_slot, slot_names
from tests.integration.flows.conftest import PrefectServer

pytestmark = [pytest.mark.integration, pytest.mark.timeout(240)]


def plan_on(rollout: str, train: str, gate: Path = Path("none")) -> Any:
    pools = PoolsSection(rollout=rollout, train=train)
    spec = SimpleNamespace(orchestration=SimpleNamespace(pools=pools))
    return SimpleNamespace(spec=spec, dir=SimpleNamespace(completion=Path("none"), gate=gate))


@pytest.fixture(autouse=True)
def logger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(module, "check_pools", lambda *_, **__: None)  # no workers, and none are needed here


def test_a_run_that_shares_a_pool_with_another_one_waits_for_all_of_it_and_holds_nothing(api: PrefectServer) -> None:
    plans = {
        "first": plan_on("slot-a", "slot-b"),
        "sharing": plan_on("slot-c", "slot-b"),
        "apart": plan_on("slot-c", "slot-d"),
    }
    asked, inside, ends = ({name: asyncio.Event() for name in plans} for _ in range(3))
    entered: list[str] = []

    async def run(name: str) -> None:
        asked[name].set()
        async with run_slot(plans[name]):
            entered.append(name)
            inside[name].set()
            await ends[name].wait()

    async def story() -> None:
        async with asyncio.timeout(200), asyncio.TaskGroup() as runs:
            runs.create_task(run("first"))
            await inside["first"].wait()
            runs.create_task(run("sharing"))
            await asked["sharing"].wait()
            runs.create_task(run("apart"))
            await inside["apart"].wait()  # the one that waits does not hold the pool that it could have
            assert entered == ["first", "apart"]
            ends["apart"].set()
            ends["first"].set()
            await inside["sharing"].wait()
            ends["sharing"].set()

    asyncio.run(story())


def test_a_run_that_was_decided_about_does_not_wait_for_one_that_trains(api: PrefectServer, tmp_path: Path) -> None:
    decided = tmp_path / "gate.json"
    decided.write_text("{}")

    async def story() -> None:
        trains, goes_on = run_slot(plan_on("slot-i", "slot-j")), run_slot(plan_on("slot-i", "slot-j", decided))
        async with asyncio.timeout(60), trains, goes_on:
            pass

    asyncio.run(story())


def test_a_limit_that_somebody_has_raised_stays(api: PrefectServer) -> None:
    pools = PoolsSection(rollout="slot-e", train="slot-f")

    async def story() -> list[int]:
        async with get_client() as client:
            await ensure_slots(client, pools)
            raised, other = slot_names(pools)
            await client.update_global_concurrency_limit(raised, GlobalConcurrencyLimitUpdate(limit=3))
            await ensure_slots(client, pools)
            return [(await client.read_global_concurrency_limit_by_name(name)).limit for name in (raised, other)]

    assert asyncio.run(story()) == [3, 1]


@flow
def idle() -> None:
    """Never run: only its runs are looked at."""


def test_whoever_finds_a_run_dead_gives_its_slots_back(api: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_on("slot-g", "slot-h")

    async def story() -> list[int]:
        async with get_client() as client:
            dead = (await client.create_flow_run(idle, state=Pending())).id
            monkeypatch.setattr(module, "_this_flow_run", lambda: dead)
            await ensure_slots(client, plan.spec.orchestration.pools)
            names = slot_names(plan.spec.orchestration.pools)

            async def taken() -> int:
                limits = [await client.read_global_concurrency_limit_by_name(name) for name in names]
                return sum(limit.active_slots for limit in limits)

            counts = []
            await module._acquired(client, names)  # and then its process is killed
            counts.append(await taken())
            for _ in range(2):  # the worker's hook, and the next process of the run
                await release_slot(client, dead)
                counts.append(await taken())
            async with asyncio.timeout(60), run_slot(plan):
                counts.append(await taken())
            counts.append(await taken())
            return counts

    assert asyncio.run(story()) == [2, 0, 0, 2, 0]
