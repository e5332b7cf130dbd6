"""Recurring training on a real Prefect server: what registration leaves there, and what events start."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

import pytest
from prefect import get_client
from prefect.events import emit_event
from prefect.states import Suspended

from disagg_core.errors import BadInput
from disagg_core.run_spec.document import PoolsSection
from disagg_core.run_spec.yaml_file import load_spec
from flows.platform.deployments import Nightly, register, register_all
from flows.platform.recurring import TRIGGERS
from tests.integration.flows.conftest import PrefectServer
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

NIGHTLY = Path(__file__).resolve().parents[3] / "infra" / "runs" / "nightly.yaml"


def deployment(api: PrefectServer, name: str) -> dict[str, object]:
    (found,) = api.find("deployments", deployments={"name": {"any_": [name]}})
    return found


def runs_of(api: PrefectServer, name: str) -> list[dict[str, object]]:
    return api.find("flow_runs", deployments={"name": {"any_": [name]}})


def test_the_nightly_schedule_is_off_until_somebody_gives_a_document(api: PrefectServer) -> None:
    before = runs_of(api, "nightly")
    register()
    (schedule,) = deployment(api, "nightly")["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("0 22 * * *", False)
    assert runs_of(api, "nightly") == before

    ours = load_spec(NIGHTLY, ["run.name=ours"])
    asyncio.run(register_all(PoolsSection(), Nightly(ours, "30 1 * * *")))
    register()  # another registration takes nothing back
    given = deployment(api, "nightly")
    (schedule,) = given["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("30 1 * * *", True)
    assert given["parameters"]["spec"]["run"]["name"] == "ours"
    assert deployment(api, "on-demand")["parameters"]["spec"]["run"]["name"] == "ours"


@pytest.mark.parametrize("event", sorted(TRIGGERS))
def test_an_event_starts_a_run(registered: PrefectServer, event: str) -> None:
    """The server may need some seconds to watch for a new automation's event, which is therefore sent again."""
    api = registered
    (automation,) = api.find("automations", automations={"name": {"any_": [TRIGGERS[event]]}})

    def started() -> bool:
        emit_event(event=event, resource={"prefect.resource.id": "draftline.draft.model"}, payload={"reason": "seen"})
        return any((run["created_by"] or {}).get("id") == automation["id"] for run in runs_of(api, "on-demand"))

    eventually(started, every_s=2.0)


def test_an_automation_that_somebody_switched_off_stays_off(registered: PrefectServer) -> None:
    api = registered
    name = TRIGGERS["draftline.data.arrived"]
    (found,) = api.find("automations", automations={"name": {"any_": [name]}})

    async def switch_off() -> None:
        async with get_client() as client:
            await client.pause_automation(UUID(str(found["id"])))

    asyncio.run(switch_off())
    register()
    (again,) = api.find("automations", automations={"name": {"any_": [name]}})
    assert again["enabled"] is False
    assert again["id"] == found["id"]


def test_a_notification_block_that_is_not_there_is_named(api: PrefectServer) -> None:
    with pytest.raises(BadInput, match=r"--notify: expected a notification block.*found 'slack-webhook/none'"):
        register(notify="slack-webhook/none")


def test_a_run_that_waits_for_approval_is_no_zombie() -> None:
    from flows.platform.deployments import zombie_automation

    trigger = zombie_automation().trigger
    assert f"prefect.flow-run.{Suspended().name}" in trigger.expect  # type: ignore[union-attr]
