"""Automations of recurring training: which events start it, and who is told how its runs end."""

from __future__ import annotations

from uuid import UUID

from prefect import get_client
from prefect.automations import Automation, EventTrigger, Posture
from prefect.client.orchestration import PrefectClient
from prefect.events.actions import RunDeployment, SendNotification
from prefect.exceptions import ObjectNotFound

from disagg_core.errors import BadInput

TRIGGERS = {
    "draftline.target.changed": "draftline: train when the target changed",
    "draftline.data.arrived": "draftline: train when data arrived",
    "draftline.accept_length.dropped": "draftline: train when the accept length dropped",
}
"""The events that start a run of recurring training, and the automations that see to it."""
NOTIFIED = ("failed", "rejected", "promoted", "needs-approval")
"""Ends of a run that people are told of."""
NOTIFICATIONS = "draftline: tell how runs end"


async def ensure_triggers(deployment_id: UUID) -> None:
    """Create the automations that start the deployment, or bring them up to date; those that are off stay off."""
    async with get_client() as client:
        for event, name in TRIGGERS.items():
            automation = Automation(
                name=name,
                description=f"The event {event}, which draft-watch or a pipeline of yours emits, starts a training.",
                trigger=EventTrigger(expect={event}, posture=Posture.Reactive, threshold=1),
                actions=[RunDeployment(source="selected", deployment_id=deployment_id)],
            )
            await _ensure(client, automation)


async def ensure_notifications(block: str) -> None:
    """Have a notification block, ``slug/name`` (``slack-webhook/ops``), told of every run that ends as in `NOTIFIED`.

    Raises:
        BadInput: there is no such block on the server.
    """
    slug, _, name = block.partition("/")
    async with get_client() as client:
        try:
            found = await client.read_block_document_by_name(name, slug)
        except ObjectNotFound as error:
            raise BadInput(
                f"--notify: expected a notification block, slug/name as slack-webhook/ops, found {block!r}, which the "
                "server does not have; make one in the UI under Blocks"
            ) from error
        automation = Automation(
            name=NOTIFICATIONS,
            trigger=EventTrigger(
                expect={f"draftline.run.{end}" for end in NOTIFIED}, posture=Posture.Reactive, threshold=1
            ),
            actions=[
                SendNotification(
                    block_document_id=found.id,
                    subject="{{ event.event }}: {{ event.resource.name }}",
                    body="{{ event.payload.version }} {{ event.payload.reason }}",
                )
            ],
        )
        await _ensure(client, automation)


async def _ensure(client: PrefectClient, wanted: Automation) -> None:
    known = await client.read_automations_by_name(wanted.name)
    if not known:
        await wanted.acreate()
    for automation in known:
        if (automation.trigger, automation.actions) != (wanted.trigger, wanted.actions):
            await client.update_automation(automation.id, wanted.model_copy(update={"enabled": automation.enabled}))
