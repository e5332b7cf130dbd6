"""What `draftline register` and `prefect deploy --all` put on a server: runs and automation agree on the heartbeat."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.automations import Automation, EventTrigger

from flows.platform.deployments import ZOMBIE_AUTOMATION, register, zombie_automation
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


@pytest.mark.parametrize("enabled", [True, False])
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


def job_environments(api: PrefectServer) -> dict[str, object]:
    flows = {flow["id"]: flow["name"] for flow in api.find("flows")}
    ours = api.find("deployments", deployments={"tags": {"all_": ["draftline"]}})
    return {f"{flows[one['flow_id']]}/{one['name']}": dict(one["job_variables"])["env"] for one in ours}


def test_every_deployment_sets_the_rate_of_its_runs(api: PrefectServer) -> None:
    register()
    registered = job_environments(api)
    assert set(registered) == {
        "online-disagg-training/local",
        "rollout-producer/gpu-rollout",
        "draft-evaluation/gpu-rollout",
        "train-consumer/gpu-train",
    }
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(
        [*command, "--prefect-file", "infra/prefect.yaml"],
        cwd=ROOT,
        env={**api.environment, "DRAFTLINE_CHECKOUT": str(ROOT)},
        check=True,
        timeout=120,
    )
    deployed = job_environments(api)
    assert set(deployed) - set(registered) == {"online-disagg-training/training"}
    assert [environment for environment in deployed.values() if environment != HEARTBEAT_ENVIRONMENT] == []
