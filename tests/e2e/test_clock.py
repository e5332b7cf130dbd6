"""Nights that the clock starts, on the whole platform: one at a time, and although the Prefect server dies."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.chaos.platform import platform_in
from tests.e2e.nights import Nights

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]

EVERY_MINUTE = "* * * * *"


@pytest.fixture
def nights(tmp_path: Path) -> Iterator[Nights]:
    """Nights on a platform whose server the test kills."""
    with platform_in(tmp_path / "clock-home") as platform:
        yield Nights(platform, tmp_path)


def test_a_night_waits_for_the_one_before_and_both_outlast_the_death_of_the_server(nights: Nights) -> None:
    nights.arrive(0, 64)
    nights.register("evaluation.prompts=6", "data.epochs=30", cron=EVERY_MINUTE)  # minutes: others fall due
    running = nights.await_run("Running")
    waiting = nights.await_run("AwaitingConcurrencySlot")
    assert running["auto_scheduled"]
    assert waiting["auto_scheduled"]

    nights.platform.server().kill()
    nights.platform.start_server_again()
    back = datetime.now(UTC).isoformat()
    assert nights.state_of(waiting["id"])["name"] in ("AwaitingConcurrencySlot", "Scheduled", "Late")

    nights.await_state(running["id"], "Promoted")
    assert "nothing new: 0 prompts since v1 (the champion)" in nights.await_state(waiting["id"], "Skipped")["message"]
    first, second = (nights.platform.get(f"flow_runs/{run['id']}") for run in (running, waiting))
    assert second["start_time"] >= first["end_time"]
    later = [run for run in nights.runs_of("nightly") if run["expected_start_time"] > back]
    assert later, "the clock has stood still since the server is back"
