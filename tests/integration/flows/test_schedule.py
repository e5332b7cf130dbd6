"""A recurring training is a schedule on a deployment: the server must turn it into runs by itself."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.integration.flows.conftest import PrefectServer, running
from tests.unit.channel.kit import wait_for

pytestmark = pytest.mark.integration

GREETING = Path(__file__).with_name("greeting.py")


def test_a_schedule_starts_a_run(prefect_server: PrefectServer, tmp_path: Path) -> None:
    def scheduled_and_done() -> list[dict[str, object]]:
        runs = prefect_server.find("flow_runs", flows={"name": {"any_": ["greeting"]}})
        return [run for run in runs if run["auto_scheduled"] and run["state_type"] == "COMPLETED"]

    environment = {**prefect_server.environment, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with running([sys.executable, str(GREETING), "every 3 s"], environment, tmp_path / "greeting.log"):
        wait_for(scheduled_and_done, 60, poll_s=0.2)
    created_by = scheduled_and_done()[0]["created_by"]
    assert isinstance(created_by, dict)
    assert created_by["type"] == "SCHEDULE"
