"""The end of a flow waits for a server that is away: what cannot be told of is taken for dead."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from tasks import reporting, server_away

pytestmark = pytest.mark.unit


class Server:
    """Refuses connections so many times, then answers."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.asked = 0

    def hello(self) -> None:
        self.asked += 1
        if self.asked <= self.refusals:
            raise httpx.ConnectError("refused")


@pytest.mark.parametrize(("refusals", "budget_s", "asked"), [(0, 180.0, 1), (7, 180.0, 8), (10**6, 0.0, 1)])
def test_it_waits_until_the_server_answers_or_the_time_is_up(
    refusals: int, budget_s: float, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(refusals)
    monkeypatch.setattr(server_away, "get_client", lambda **_: contextlib.nullcontext(server))
    monkeypatch.setattr(server_away, "_POLL_S", 0.001)
    monkeypatch.setattr(server_away, "_SERVER_AWAY_S", budget_s)
    with temporary_settings(updates={PREFECT_API_URL: "http://server/api"}):
        server_away.wait_for_server()
    assert server.asked == asked


def test_a_report_that_cannot_be_shown_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    written: list[object] = []
    monkeypatch.setattr(reporting, "write_report", lambda _plan, report: written.append(report))
    monkeypatch.setattr(reporting, "wait_for_server", lambda: None)
    monkeypatch.setattr(reporting, "_show", away)
    monkeypatch.setattr(reporting, "get_run_logger", lambda: logging.getLogger("test"))
    report = object()
    assert reporting.publish_report.fn(SimpleNamespace(run_id="run"), report) is report
    assert written == [report]
    assert "is not shown in the UI: refused" in caplog.text
