"""The lease on a run's slots is renewed over a server that is away, until the server says that it is gone."""

from __future__ import annotations

import contextlib
import threading
from uuid import UUID, uuid4

import httpx
import pytest

from tasks import run_slot

pytestmark = pytest.mark.unit


class Server:
    """Answers renewals one after the other as it is told to, then says that the lease is gone."""

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.asked = 0

    def renew_concurrency_lease(self, lease: UUID, seconds: float) -> None:
        self.asked += 1
        request = httpx.Request("POST", "http://server/renew")
        answer = self.answers.pop(0) if self.answers else httpx.codes.GONE
        if answer is None:
            raise httpx.ConnectError("refused", request=request)
        httpx.Response(answer, request=request).raise_for_status()


@pytest.mark.parametrize(
    ("answers", "asked"), [((), 1), ((204, 204), 3), ((None, None, None, 204), 5), ((503, 204, None), 4)]
)
def test_it_is_renewed_until_it_is_gone(
    answers: tuple[int | None, ...], asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(*answers)
    monkeypatch.setattr(run_slot, "get_client", lambda **_: contextlib.nullcontext(server))
    monkeypatch.setattr(run_slot, "_RENEWAL_S", 0.001)
    run_slot._renew(uuid4(), threading.Event())
    assert server.asked == asked
