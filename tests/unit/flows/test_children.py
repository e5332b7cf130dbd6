"""Watching a flow run while its Prefect server comes and goes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import httpx
import pytest

from tasks import children

pytestmark = pytest.mark.unit


class AwayServer:
    """A client whose server does not answer before `back_s` seconds of the loop's clock."""

    def __init__(self, back_s: float) -> None:
        self._back_s = back_s

    async def read_flow_run(self, run_id: UUID) -> UUID:
        if asyncio.get_running_loop().time() < self._back_s:
            raise httpx.ConnectError("refused")
        return run_id


class JumpingLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still but for `asyncio.sleep`, which takes no time."""

    now = 0.0

    def time(self) -> float:
        return self.now


@contextmanager
def jumping_clock() -> Iterator[asyncio.Runner]:
    async def sleep(seconds: float) -> None:
        asyncio.get_running_loop().now += seconds

    with pytest.MonkeyPatch.context() as patch, asyncio.Runner(loop_factory=JumpingLoop) as runner:
        patch.setattr(children.asyncio, "sleep", sleep)
        yield runner


def test_a_server_that_is_away_for_two_minutes_is_waited_for() -> None:
    run_id = uuid4()
    with jumping_clock() as runner:
        assert runner.run(children._read(AwayServer(back_s=120), run_id)) == run_id


def test_a_server_that_does_not_come_back_is_an_error() -> None:
    with jumping_clock() as runner, pytest.raises(httpx.ConnectError):
        runner.run(children._read(AwayServer(back_s=3600), uuid4()))
