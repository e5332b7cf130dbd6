"""What `draftline register` and `prefect deploy --all` put on a server: runs and automation agree on the heartbeat."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import get_client
from prefect.automations import Automation, EventTrigger
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.workers.process import ProcessWorker

from disagg_core.run_spec.document import PoolsSection
from flows.platform.deployments import (
    TAG,
    ZOMBIE_AUTOMATION,
    deployments,
    register,
    register_all,
    zombie_automation,
)
from flows.platform.submission import DEPLOYMENT
from tasks.heartbeat import HEARTBEAT_ENVIRONMENT
from tests.integration.flows.conftest import PrefectServer

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


def automations(api: PrefectServer) -> list[dict[str, object]]:
    return api.find("automations", automations={"name": {"any_": [ZOMBIE_AUTOMATION]}})


def an_older_automation(*, enabled: bool) -> Automation:
    wanted = zombie_automation()
    assert isinstance(wanted.trigger, EventTrigger)
    trigger = wanted.trigger.model_copy(update={"within": timedelta(seconds=90), "match_related": {}})
    return wanted.model_copy(update={"trigger": trigger, "enabled": enabled})


@pytest.mark.parametrize("enabled", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_automation_of_an_older_version_is_brought_up_to_date(api: PrefectServer, enabled: bool) -> None:
    for known in automations(api):
        Automation.read(id=known["id"]).delete()
    older = an_older_automation(enabled=enabled).create()
    register()
    (found,) = automations(api)
    assert found["id"] == str(older.id)
    assert found["enabled"] == enabled, "who switched it off meant it"
    updated, wanted = Automation.read(name=ZOMBIE_AUTOMATION), zombie_automation()
    assert (updated.trigger, updated.actions) == (wanted.trigger, wanted.actions)
    register()
    assert automations(api) == [found], "another update would forget the runs that are watched"


def deployed(api: PrefectServer) -> dict[str, dict[str, object]]:
    """Our deployments on the server, by full name: what of them is the same whoever registered them."""
    flows = {flow["id"]: flow["name"] for flow in api.find("flows")}
    return {
        f"{flows[one['flow_id']]}/{one['name']}": {
            "pool": one["work_pool_name"],
            "tags": sorted(one["tags"]),
            "description": one["description"],
            "limit": one["global_concurrency_limit"] and one["global_concurrency_limit"]["limit"],
            "collisions": one["concurrency_options"],
            "job variables": one["job_variables"],
            "flow": one["entrypoint"].replace("/", ".").replace(".py:", "."),
            "paused": one["paused"],
        }
        for one in api.find("deployments", deployments={"tags": {"all_": [TAG]}})
    }


def forget_deployments(api: PrefectServer) -> None:
    with get_client(sync_client=True) as client:
        for one in api.find("deployments"):
            client.delete_deployment(UUID(str(one["id"])))


def test_what_prefect_deploy_registers_is_what_draftline_registers_and_finds(api: PrefectServer) -> None:
    forget_deployments(api)
    register()
    registered = deployed(api)
    assert set(registered) == {DEPLOYMENT, *(f"{one.flow.name}/{one.name}" for one in deployments(PoolsSection()))}
    assert all(one["job variables"] == {"env": HEARTBEAT_ENVIRONMENT} for one in registered.values())

    forget_deployments(api)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(
        [*command, "--prefect-file", "infra/prefect.yaml"],
        cwd=ROOT,
        env={**api.environment, "DRAFTLINE_CHECKOUT": str(ROOT)},
        check=True,
        timeout=120,
    )
    assert deployed(api) == registered


def test_runs_on_a_pool_that_was_there_before_do_not_write_to_their_worker(api: PrefectServer) -> None:
    """`prefect work-pool create --type process` makes runs that exit when their worker has died and they log a line."""
    pools = PoolsSection(orchestrator="pool-a", rollout="pool-b", train="pool-c")
    template = ProcessWorker.get_default_base_job_template()
    template["variables"]["properties"]["working_dir"]["default"] = "/theirs"

    async def story() -> list[dict[str, Any]]:
        async with get_client() as client:
            await client.create_work_pool(WorkPoolCreate(name="pool-a", type="process", base_job_template=template))
            await register_all(pools)
            await register_all(pools)
            read = [await client.read_work_pool(name) for name in ("pool-a", "pool-b", "pool-c")]
            return [pool.base_job_template["variables"]["properties"] for pool in read]

    found = asyncio.run(story())
    assert [properties["stream_output"]["default"] for properties in found] == [False] * 3
    assert found[0]["working_dir"]["default"] == "/theirs"
