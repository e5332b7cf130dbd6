"""The platform on one machine keeps to itself, and its parts come back when they die."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pytest

from disagg_core.processes.retry import wait_until
from tests.kit.runs import Draftline, Ours, report_of

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(560)]


@pytest.fixture(autouse=True)
def shell_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a user who works behind a proxy and looks after another Prefect server."""
    database = tmp_path / "foreign.db"
    for name in ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"):
        monkeypatch.setenv(name, f"sqlite+aiosqlite:///{database}")
    for name in ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING", "PREFECT_API_KEY"):
        monkeypatch.setenv(name, "not:ours")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return database


def test_a_run_ends_well_in_the_shell_of_somebody_else_although_its_workers_are_killed(
    shell_of_somebody_else: Path, home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    run = draftline("run", tiny)
    assert wait_until(
        lambda: list(home.glob("runs/*/attempts/1/state/consumer.json")) or run.poll() is not None,
        timeout_s=300,
        every_s=0.2,
    )
    assert run.poll() is None, run.communicate()[0]
    members = json.loads((home / "platform.json").read_text())["members"]
    keeper = psutil.Process(members["workers"]["pid"])
    (workers,) = (child for child in keeper.children() if "serve" in child.cmdline())
    workers.send_signal(signal.SIGKILL)  # the keeper starts others: the evaluation needs one
    output, _ = run.communicate(timeout=500)

    assert run.returncode == 0, output
    report = report_of(home)
    assert report.state == "completed"
    assert [attempt.failure_class for attempt in report.attempts] == [None]
    assert "the workers died (killed by SIGKILL) and are started again" in (home / "logs" / "workers.log").read_text()
    server_log = (home / "logs" / "server.log").read_text()
    assert "Traceback" not in server_log
    assert "database is locked" not in server_log
    assert not shell_of_somebody_else.exists()
    assert ours() == []
