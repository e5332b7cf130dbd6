"""The pool of servers: who gets work, what is checked when, and what becomes of servers that go and come back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_core.engines.servers import pool as pool_module
from disagg_core.engines.servers.pool import PoolMember, ServerPool
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.errors import Preempted, TargetError, TargetUnavailable
from tests.kit.waiting import eventually

pytestmark = pytest.mark.unit


@pytest.fixture
def pool_of() -> Iterator[Callable[..., ServerPool]]:
    made: list[ServerPool] = []

    def make(
        servers: list[Any], check: Callable[[SglangClient], None] = lambda client: None, **changes: Any
    ) -> ServerPool:
        members = [
            PoolMember(SglangClient(f"server-{number}", server.url, timeout_s=2.0))
            for number, server in enumerate(servers)
        ]
        times = {"start_timeout_s": 1.0, "place_timeout_s": 5.0, "health_timeout_s": 1.0, **changes}
        made.append(ServerPool(members, concurrency=2, check=check, **times))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def states(pool: ServerPool) -> dict[str, str]:
    return {server.name: server.state for server in pool.health()}


def events_of(pool: ServerPool, name: str) -> list[str]:
    return {server.name: server.events for server in pool.health()}[name]


def test_every_server_is_checked_before_its_first_request(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    checked: list[str] = []
    pool = pool_of([scripted(), scripted()], lambda client: checked.append(client.name))
    pool.start()

    assert sorted(checked) == ["server-0", "server-1"]
    assert pool.acquire(frozenset({"server-0"})).name == "server-1"


def test_servers_that_are_not_the_target_are_all_named(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    def check(client: SglangClient) -> None:
        if client.name != "server-1":
            raise TargetError(f"{client.name} is not the run's target")

    pool = pool_of([scripted(), scripted(), scripted()], check)

    with pytest.raises(TargetError, match=r"server-0 is not the run's target; server-2 is not the run's target"):
        pool.start()


def test_without_any_server_the_target_is_unavailable(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    server = scripted()
    server.healthy = False
    pool = pool_of([server], start_timeout_s=0.1)

    with pytest.raises(TargetUnavailable, match=r"server-0: was not healthy within 0\.1 s"):
        pool.start()


def test_places_are_bounded_and_given_back(scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]) -> None:
    pool = pool_of([scripted()], place_timeout_s=0.2)
    pool.start()
    first = pool.acquire(frozenset())
    pool.succeeded(first.name, captured=True)  # on probation at first: one at a time
    pool.acquire(frozenset())
    pool.acquire(frozenset())

    with pytest.raises(TargetUnavailable, match="no server had a place"):
        pool.acquire(frozenset())
    pool.succeeded(first.name, captured=True)
    assert pool.acquire(frozenset()).name == "server-0"


def test_a_request_to_stop_is_heard_while_servers_start(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    """A large model takes minutes to load; whoever stops the run then does not wait for it."""
    server = scripted()
    server.healthy = False
    asked = iter([False, False, True])

    def check_stop() -> None:
        if next(asked):
            raise Preempted("SIGTERM")

    with pytest.raises(Preempted):
        pool_of([server], start_timeout_s=600.0).start(while_waiting=check_stop)


def test_closing_does_not_wait_for_a_supervisor_that_waits_for_its_server(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "POOL_S", 0.2)
    checking, released = threading.Event(), threading.Event()

    def check(client: SglangClient) -> None:
        if client.name == "server-1":
            checking.set()
            released.wait()

    pool = pool_of([scripted(), scripted()], check)
    starting = threading.Thread(target=start_in_vain, args=(pool,))
    starting.start()
    assert checking.wait(60)

    pool.close()

    assert not released.is_set(), "close() came back although the check did not"
    released.set()
    starting.join(60)
    assert not starting.is_alive()


def start_in_vain(pool: ServerPool) -> None:
    with contextlib.suppress(TargetUnavailable):
        pool.start()


def test_a_server_that_hangs_is_taken_out_and_checked_again_when_it_is_back(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    servers = [scripted(), scripted()]
    checked: list[str] = []
    pool = pool_of(servers, lambda client: checked.append(client.name))
    pool.start()
    servers[0].healthy = False
    client = pool.acquire(frozenset({"server-1"}))
    pool.failed(client.name, "no answer in time")

    eventually(lambda: any("hangs" in event for event in events_of(pool, "server-0")))
    assert states(pool)["server-0"] == "open"
    assert pool.acquire(frozenset({"server-1"})).name == "server-1"
    servers[0].healthy = True
    eventually(lambda: checked.count("server-0") == 2)
    eventually(lambda: states(pool)["server-0"] == "probation")
    assert "back" in events_of(pool, "server-0")


def test_a_server_that_comes_back_as_another_model_gets_no_more_work(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    servers = [scripted(), scripted()]
    changed = threading.Event()

    def check(client: SglangClient) -> None:
        if client.name == "server-0" and changed.is_set():
            raise TargetError("server-0 is not the run's target: dtype")

    pool = pool_of(servers, check)
    pool.start()
    changed.set()
    servers[0].healthy = False
    pool.failed(pool.acquire(frozenset({"server-1"})).name, "no answer in time")
    eventually(lambda: any("hangs" in event for event in events_of(pool, "server-0")))
    servers[0].healthy = True

    def refused() -> bool:
        expected = "refused: server-0 is not the run's target: dtype"
        return expected in events_of(pool, "server-0")

    eventually(refused)
    assert pool.acquire(frozenset({"server-1"})).name == "server-1"


def test_a_server_that_was_replaced_by_another_model_is_noticed_at_its_next_failure(
    scripted: Callable[[], Any], pool_of: Callable[..., ServerPool]
) -> None:
    replaced = threading.Event()

    def check(client: SglangClient) -> None:
        if replaced.is_set():
            raise TargetError("another model")

    pool = pool_of([scripted()], check)
    pool.start()
    replaced.set()
    pool.failed(pool.acquire(frozenset()).name, "connection reset")

    eventually(lambda: "refused: another model" in events_of(pool, "server-0"))
    with pytest.raises(TargetUnavailable, match="server-0: refused: another model"):
        pool.acquire(frozenset())
