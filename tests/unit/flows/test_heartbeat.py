"""Which silence of a flow run counts as its death, judged by Prefect's own evaluation of our automation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.server.database import provide_database_interface
from prefect.server.database.configurations import AioSqliteConfiguration
from prefect.server.database.dependencies import temporary_database_config
from prefect.server.events import triggers
from prefect.server.events.models.automations import create_automation
from prefect.server.events.schemas.automations import Automation, EventTrigger, Firing
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, get_current_settings, temporary_settings
from prefect.types._datetime import now

from disagg_core.run_spec.yaml_file import load_spec
from flows.platform.deployments import zombie_automation
from tasks.heartbeat import HEARTBEAT_ENVIRONMENT, HEARTBEAT_S, HEARTBEAT_WINDOW_S, HeartbeatTooRare, check_heartbeat
from tasks.preflight import preflight
from tests.kit.prefect_database import copy_empty_database

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"
OURS = ["draftline", "role:consumer"]


@dataclass(frozen=True)
class Server:
    """The part of Prefect's server that evaluates automations, with ours loaded."""

    automation: Automation

    def crashes(self, beats: Iterable[int], *, until: int, end: str = "", tags: Iterable[str] = OURS) -> bool:
        """Tell whether a run is taken for dead at second `until`, which beat at `beats` and perhaps ended then."""
        began = now("UTC") - timedelta(seconds=until)
        run = f"prefect.flow-run.{uuid4()}"
        related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags]
        said = [("heartbeat", at) for at in beats]
        events = [
            ReceivedEvent(
                occurred=began + timedelta(seconds=at),
                event=f"prefect.flow-run.{what}",
                resource={"prefect.resource.id": run},
                related=related,
                id=uuid4(),
            )
            for what, at in [*said, *([(end, said[-1][1])] if end else [])]
        ]
        return run in asyncio.run(self._dead(events))

    async def _dead(self, events: list[ReceivedEvent]) -> set[str]:
        """Return the runs for which the automation fires, once `events` have come and the clock has struck."""
        found: set[str] = set()

        async def fire(_: object, firing: Firing) -> None:
            found.update(firing.triggering_labels.values())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triggers, "fire", fire)
            for event in events:
                await triggers.reactive_evaluation(event)
            await triggers.reset_events_clock()
            for trigger in self.automation.triggers_of_type(EventTrigger):
                await triggers.proactive_evaluation(trigger, now("UTC"))
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty database, to which our automation was sent."""
    file = tmp_path_factory.mktemp("server") / "prefect.db"
    copy_empty_database(tmp_path_factory, file)
    with temporary_database_config(AioSqliteConfiguration(f"sqlite+aiosqlite:///{file}")):
        sent = {**zombie_automation().model_dump(mode="json"), "id": uuid4()}
        automation = asyncio.run(_created(Automation.model_validate(sent)))
        triggers.load_automation(automation)
        yield Server(automation)
        triggers.clear_loaded_automations()


async def _created(automation: Automation) -> Automation:
    database = provide_database_interface()
    async with await database.session() as session, session.begin():
        return Automation.model_validate(
            await create_automation(session=session, automation=automation), from_attributes=True
        )


def test_a_run_that_beats_lives(server: Server) -> None:
    assert not server.crashes(range(0, 600, HEARTBEAT_S), until=600)


def test_a_run_at_the_rate_of_prefects_default_is_not_taken_for_dead(server: Server) -> None:
    assert not server.crashes(range(0, 540, 180), until=539)


def test_a_server_that_was_away_for_two_minutes_crashes_nobody(server: Server) -> None:
    """Its first look comes before the first new heartbeat: one before it went, two minutes, and its start."""
    assert not server.crashes([0, 30, 60], until=60 + HEARTBEAT_S + 120 + 60)


def test_a_run_that_fell_silent_is_dead_when_the_window_is_over(server: Server) -> None:
    assert server.crashes([0, 30, 60], until=60 + HEARTBEAT_WINDOW_S + 1)


@pytest.mark.parametrize("end", ["Completed", "Failed", "Cancelled", "Crashed"])
def test_a_run_that_ended_is_not_dead(server: Server, end: str) -> None:
    assert not server.crashes([0, 30, 60], until=1000, end=end)


def test_the_runs_of_other_people_are_none_of_our_business(server: Server) -> None:
    assert not server.crashes([0, 30, 60], until=1000, tags=["billing"])


def test_a_process_that_beats_too_rarely_is_refused() -> None:
    check_heartbeat(HEARTBEAT_S)
    check_heartbeat(HEARTBEAT_WINDOW_S // 3)
    for frequency, found in ((180, "one every 180 s"), (81, "one every 81 s"), (None, "none at all")):
        with pytest.raises(HeartbeatTooRare, match=rf"HEARTBEAT_FREQUENCY: expected .*, found {found}: .*register"):
            check_heartbeat(frequency)


def test_preflight_asks_prefect_how_often_this_process_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.preflight.check_pools", lambda spec, **_: None)  # there is no server
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 180}), pytest.raises(HeartbeatTooRare):
        preflight.fn(load_spec(DEMO))


def test_the_rate_is_set_by_the_name_that_prefect_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in HEARTBEAT_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    assert type(get_current_settings())().flows.heartbeat_frequency == HEARTBEAT_S
