"""Watching a flow run while its Prefect server comes and goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed

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


class Deployed:
    """A server whose deployments are there, or gone until they are registered again."""

    def __init__(self, back_s: float, *, gone: bool = False, pool: str | None = "gpu-train") -> None:
        self._back_s = back_s
        self.gone, self.pool = gone, pool
        self.orders: list[str] = []
        self.states: list[str] = []

    async def __aenter__(self) -> Deployed:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def answer(self) -> None:
        if asyncio.get_running_loop().time() < self._back_s:
            raise httpx.ReadError("reset")

    async def read_deployment_by_name(self, name: str) -> SimpleNamespace:
        self.answer()
        if self.gone:
            raise ObjectNotFound(LookupError(name))
        return SimpleNamespace(work_pool_name=self.pool)

    async def read_flow_run(self, run_id: UUID) -> SimpleNamespace:
        self.answer()
        state = Completed() if not self.states else Cancelled()
        return SimpleNamespace(id=run_id, state=state, start_time=None)

    async def set_flow_run_state(self, run_id: UUID, state: object, force: bool = False) -> None:
        self.answer()
        self.states.append(type(state).__name__)

    async def order(self, name: str, *, idempotency_key: str, **_: object) -> SimpleNamespace:
        self.orders.append(idempotency_key)
        self.answer()
        return SimpleNamespace(id=uuid4())

    async def register(self, pools: object) -> None:
        self.gone, self.pool = False, "gpu-train"


@contextmanager
def server(deployed: Deployed) -> Iterator[asyncio.Runner]:
    with jumping_clock() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "get_client", lambda: deployed)
        patch.setattr(children, "arun_deployment", deployed.order)
        patch.setattr(children, "get_run_logger", lambda: logging.getLogger("test"))
        patch.setattr(children.pkgutil, "resolve_name", lambda name: deployed.register)
        yield runner


def run_child() -> Coroutine[Any, Any, Any]:
    return children.run_child(
        "train-consumer",
        "gpu-train",
        {},
        name="n",
        tags=[],
        start_timeout_s=900,
        supervision=children.Supervision(),
    )


def test_a_role_is_ordered_once_although_the_server_is_away_when_its_turn_comes() -> None:
    deployed = Deployed(back_s=0)
    order = deployed.order

    async def order_with_a_lost_answer(name: str, **options: Any) -> SimpleNamespace:
        if not deployed.orders:
            deployed._back_s = asyncio.get_running_loop().time() + 120
        return await order(name, **options)

    deployed.order = order_with_a_lost_answer  # type: ignore[method-assign]
    with server(deployed) as runner:
        child = runner.run(run_child())
    assert child.state.is_completed()
    assert len(deployed.orders) > 1
    assert len(set(deployed.orders)) == 1


def test_a_child_is_cancelled_by_a_server_that_was_away() -> None:
    deployed = Deployed(back_s=120)
    with server(deployed) as runner:
        runner.run(children._patiently(lambda: deployed.set_flow_run_state(uuid4(), Cancelled())))
    assert len(deployed.states) == 1


@pytest.mark.parametrize("deployed", [Deployed(0, gone=True), Deployed(0, pool=None)], ids=["deployment", "pool"])
def test_what_was_deleted_in_the_ui_is_registered_again(deployed: Deployed, caplog: pytest.LogCaptureFixture) -> None:
    with server(deployed) as runner, caplog.at_level(logging.WARNING):
        assert runner.run(run_child()).state.is_completed()
    assert "train-consumer/gpu-train, or pool gpu-train, was deleted" in caplog.text
